//! ACPI power management registers (ICH9 datasheet section 13.8.3; ACPI 6 section 4.8.3): the SCI, the
//! PM timer, sleep states, the power button and general purpose events.
//!
//! There is no system management mode here: what firmware would do on an SMI, the chip does itself
//! (SMI_CMD switches SCI on and off).

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Clock, DeviceState, Handler, IrqLine, Registers, StateError, Timer, locked};

use super::BoardEvents;

/// Bytes of the register block.
pub const LENGTH: u64 = 128;
/// Offset of PM1a_EVT_BLK (4 bytes).
pub const PM1_EVENT: u64 = 0x00;
/// Offset of PM1a_CNT_BLK (2 bytes).
pub const PM1_CONTROL: u64 = 0x04;
/// Offset of PM_TMR_BLK (4 bytes).
pub const PM_TIMER: u64 = 0x08;
/// Offset of GPE0_BLK (16 bytes: 8 of status, 8 of enables).
pub const GPE0: u64 = 0x20;
/// SLP_TYP of S5, for the `\_S5` object.
pub const SLEEP_TYPE_S5: u8 = 7;
/// What to write to SMI_CMD to switch ACPI on (FADT ACPI_ENABLE).
pub const ACPI_ENABLE: u8 = 2;
/// What to write to SMI_CMD to switch ACPI off (FADT ACPI_DISABLE).
pub const ACPI_DISABLE: u8 = 3;
/// The PM timer's frequency in Hz (ACPI 6 section 4.8.2.1).
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// PM1 status and enable: timer overflow, global lock, power button, RTC, wake.
const TIMER_OVERFLOW: u16 = 1 << 0;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const RTC: u16 = 1 << 10;
const WAKE: u16 = 1 << 15;
const STATUS_BITS: u16 = TIMER_OVERFLOW | 1 << 4 | GLOBAL | POWER_BUTTON | RTC | WAKE;
const ENABLE_BITS: u16 = TIMER_OVERFLOW | GLOBAL | POWER_BUTTON | RTC;

/// PM1 control: SCI enable, bus master reload, sleep type 12:10, sleep enable (write-only).
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_BITS: u16 = SCI_ENABLE | 1 << 1 | SLEEP_TYPE;
/// Sleep types of ICH9 (section 13.8.3.3): 6 is S4 and 7 is S5, which are the same to the hardware.
const S4: u16 = 6;

const NS: u128 = 1_000_000_000;

/// How many bits the PM timer has; ICH9 has 24, and the FADT's TMR_VAL_EXT says 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerWidth {
    /// 24 bits: overflows every 2.3 s.
    Bits24,
    /// 32 bits: overflows every 10 min.
    Bits32,
}

impl TimerWidth {
    fn mask(self) -> u64 {
        match self {
            Self::Bits24 => 0xff_ffff,
            Self::Bits32 => 0xffff_ffff,
        }
    }

    /// Ticks between changes of the highest bit, which is what "overflow" means.
    fn overflow(self) -> u64 {
        (self.mask() >> 1) + 1
    }
}

/// The power management block.
pub struct AcpiPm {
    sci: IrqLine,
    events: Arc<dyn BoardEvents>,
    clock: Clock,
    timer: Timer,
    width: TimerWidth,

    status: u16,
    enable: u16,
    control: u16,
    /// The PM timer tick at which the overflow status is set next.
    overflow_at: u64,
    gpe_status: u64,
    gpe_enable: u64,
    /// SMI_CMD's neighbour, a scratch byte.
    smi_status: u8,
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, enable, control, .. } = self;
        write!(f, "AcpiPm(status {status:#x}, enable {enable:#x}, control {control:#x})")
    }
}

impl AcpiPm {
    /// The block on `clock`, with `sci` for its interrupt (level, active high).
    #[must_use]
    pub fn new(
        clock: Clock,
        sci: IrqLine,
        events: Arc<dyn BoardEvents>,
        width: TimerWidth,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let timer = clock.timer(move |_| {
                if let Some(pm) = me.upgrade() {
                    locked(&pm).update();
                }
            });
            Mutex::new(Self {
                sci,
                events,
                clock,
                timer,
                width,
                status: 0,
                enable: 0,
                control: 0,
                overflow_at: width.overflow(),
                gpe_status: 0,
                gpe_enable: 0,
                smi_status: 0,
            })
        })
    }

    fn ticks(&self) -> u64 {
        let ticks = u128::from(self.clock.now()) * u128::from(TIMER_FREQUENCY) / NS;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// The user pressed the power button.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.update();
    }

    /// Sets general purpose event `bit` (0–63), as hotplug controllers do.
    pub fn raise_gpe(&mut self, bit: u8) {
        self.gpe_status |= 1_u64.checked_shl(u32::from(bit)).unwrap_or(0);
        self.update();
    }

    /// Whether the guest's ACPI driver has taken over, and so would notice the power button.
    #[must_use]
    pub fn is_acpi_enabled(&self) -> bool {
        self.control & SCI_ENABLE != 0
    }

    /// Status follows the timer; SCI follows the status; the host timer waits for the next overflow
    /// if that would interrupt.
    fn update(&mut self) {
        if self.ticks() >= self.overflow_at {
            self.status |= TIMER_OVERFLOW;
        }
        let events = self.status & self.enable & ENABLE_BITS != 0 || self.gpe_status & self.gpe_enable != 0;
        self.sci.set(events && self.is_acpi_enabled());
        if self.enable & TIMER_OVERFLOW != 0 && self.status & TIMER_OVERFLOW == 0 {
            let at = (u128::from(self.overflow_at) * NS).div_ceil(u128::from(TIMER_FREQUENCY));
            self.timer.arm(u64::try_from(at).unwrap_or(u64::MAX));
        } else {
            self.timer.cancel();
        }
    }

    fn smi_command(&mut self, value: u8) {
        match value {
            ACPI_ENABLE => self.control |= SCI_ENABLE,
            ACPI_DISABLE => self.control &= !SCI_ENABLE,
            _ => {}
        }
        self.update();
    }

    /// The aligned dword at `offset`.
    fn read32(&mut self, offset: u64) -> u32 {
        let [gs, ge] = [self.gpe_status, self.gpe_enable];
        let half = |v: u64, high: u64| u32::try_from(v >> (high * 32) & 0xffff_ffff).unwrap_or(0);
        match offset {
            PM1_EVENT => {
                self.update();
                u32::from(self.status) | u32::from(self.enable) << 16
            }
            PM1_CONTROL => u32::from(self.control),
            PM_TIMER => half(self.ticks() & self.width.mask(), 0),
            0x20 | 0x24 => half(gs, offset >> 2 & 1),
            0x28 | 0x2c => half(ge, offset >> 2 & 1),
            _ => 0,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let shift = offset & 1;
        let (mask, word) = (0xff_u16 << (8 * shift), u16::from(value) << (8 * shift));
        match offset {
            0x00 | 0x01 => {
                self.update();
                if word & TIMER_OVERFLOW != 0 {
                    let step = self.width.overflow();
                    self.overflow_at = (self.ticks() / step + 1).saturating_mul(step);
                }
                self.status &= !(word & STATUS_BITS);
            }
            0x02 | 0x03 => self.enable = (self.enable & !mask | word) & ENABLE_BITS,
            0x04 | 0x05 => {
                self.control = (self.control & !mask | word) & CONTROL_BITS;
                // Sleep type and enable are in one byte.
                if word & SLEEP_ENABLE != 0 {
                    self.sleep();
                }
            }
            0x20..0x28 => self.gpe_status &= !(u64::from(value) << (8 * (offset & 7))),
            0x28..0x30 => {
                let shift = 8 * (offset & 7);
                self.gpe_enable = self.gpe_enable & !(0xff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
    }

    fn sleep(&self) {
        match (self.control & SLEEP_TYPE) >> 10 {
            S4 | 7 => self.events.power_off(),
            other => tracing::debug!("sleep type {other} is not supported"),
        }
    }
}

impl Registers for AcpiPm {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        if size > 4 || (offset & 3) + u64::from(size) > 4 {
            return None;
        }
        Some(u64::from(self.read32(offset & !3) >> (8 * (offset & 3))))
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        if size > 4 {
            return false;
        }
        for (i, byte) in (0..u64::from(size)).zip(value.to_le_bytes()) {
            self.write_byte(offset + i, byte);
        }
        self.update();
        true
    }
}

/// SMI_CMD and the status byte beside it (APM_CNT and APM_STS, ICH9 section 13.7.2).
#[derive(Debug)]
pub struct SmiPorts(pub Arc<Mutex<AcpiPm>>);

impl Handler for SmiPorts {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        let pm = locked(&self.0);
        (size == 1).then(|| if offset == 1 { u64::from(pm.smi_status) } else { 0 })
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        let [value, status, ..] = value.to_le_bytes();
        let mut pm = locked(&self.0);
        match (offset, size) {
            (0, 1) => pm.smi_command(value),
            (1, 1) => pm.smi_status = value,
            (0, 2) => {
                pm.smi_status = status;
                pm.smi_command(value);
            }
            _ => return false,
        }
        true
    }
}

/// Saved state. The PM timer is virtual time, so it is not in here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
    overflow_at: u64,
    gpe_status: u64,
    gpe_enable: u64,
    smi_status: u8,
}

impl DeviceState for AcpiPm {
    const NAME: &'static str = "acpi-pm";
    type State = AcpiPmState;

    fn save(&self) -> AcpiPmState {
        let Self {
            sci: _,
            events: _,
            clock: _,
            timer: _,
            width: _,
            status,
            enable,
            control,
            overflow_at,
            gpe_status,
            gpe_enable,
            smi_status,
        } = self;
        AcpiPmState {
            status: *status,
            enable: *enable,
            control: *control,
            overflow_at: *overflow_at,
            gpe_status: *gpe_status,
            gpe_enable: *gpe_enable,
            smi_status: *smi_status,
        }
    }

    fn restore(&mut self, state: AcpiPmState) -> Result<(), StateError> {
        let AcpiPmState { status, enable, control, overflow_at, gpe_status, gpe_enable, smi_status } = state;
        self.status = status & STATUS_BITS;
        self.enable = enable & ENABLE_BITS;
        self.control = control & CONTROL_BITS;
        self.overflow_at = overflow_at;
        self.gpe_status = gpe_status;
        self.gpe_enable = gpe_enable;
        self.smi_status = smi_status;
        self.update();
        Ok(())
    }

    fn reset(&mut self) {
        self.status = 0;
        self.enable = 0;
        self.control = 0;
        self.gpe_status = 0;
        self.gpe_enable = 0;
        self.smi_status = 0;
        let step = self.width.overflow();
        self.overflow_at = (self.ticks() / step + 1).saturating_mul(step);
        self.update();
    }
}

#[cfg(test)]
#[path = "acpi_pm_tests.rs"]
mod tests;

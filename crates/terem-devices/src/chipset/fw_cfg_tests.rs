use super::*;
use proptest::prelude::*;
use std::sync::Mutex;
use terem_bus::locked;
use terem_memory::RamRange;

const MIB: u64 = 1 << 20;

fn device() -> (FwCfg, GuestMemory, Arc<Mutex<Vec<u8>>>) {
    let memory = GuestMemory::new(&[RamRange { base: 0, size: MIB }]).unwrap();
    let mut f = FwCfg::new(memory.clone());
    f.add_item(0x05, Arc::new(4_u16.to_le_bytes().to_vec())).unwrap();
    f.add_file("etc/one", Arc::new(vec![1, 2, 3, 4, 5])).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let s = Arc::clone(&seen);
    f.add_writable("etc/two", vec![0; 4], Box::new(move |b| *locked(&s) = b.to_vec())).unwrap();
    (f, memory, seen)
}

fn bytes(f: &mut FwCfg, key: u64, n: usize) -> Vec<u64> {
    assert!(Registers::write(f, 0, 2, key));
    (0..n).map(|_| Registers::read(f, 1, 1).unwrap()).collect()
}

/// Does a transfer with its structure at 1000h; the control word afterwards.
fn dma(f: &mut FwCfg, memory: &GuestMemory, control: u32, len: u32, address: u64) -> u32 {
    let at = GuestAddress(0x1000);
    memory.write_slice(&control.to_be_bytes(), at).unwrap();
    memory.write_slice(&len.to_be_bytes(), GuestAddress(0x1004)).unwrap();
    memory.write_slice(&address.to_be_bytes(), GuestAddress(0x1008)).unwrap();
    assert!(Registers::write(f, 4, 4, 0));
    assert!(Registers::write(f, 8, 4, u64::from(0x1000_u32.swap_bytes())));
    let mut status = [0; 4];
    memory.read_slice(&mut status, at).unwrap();
    u32::from_be_bytes(status)
}

#[test]
fn items_are_read_byte_by_byte() {
    let (mut f, _, _) = device();
    assert_eq!(bytes(&mut f, 0, 5), [0x51, 0x45, 0x4d, 0x55, 0]);
    assert_eq!(bytes(&mut f, 1, 4), [3, 0, 0, 0]);
    assert_eq!(bytes(&mut f, 5, 2), [4, 0]);
    assert_eq!(bytes(&mut f, 0x20, 6), [1, 2, 3, 4, 5, 0]);
    assert_eq!(bytes(&mut f, 0x3fff, 1), [0]);
    let directory = bytes(&mut f, 0x19, 4 + 2 * 64);
    assert_eq!(directory[..8], [0, 0, 0, 2, 0, 0, 0, 5]);
    assert_eq!(directory[8..19], [0, 0x20, 0, 0, 0x65, 0x74, 0x63, 0x2f, 0x6f, 0x6e, 0x65]);
    assert_eq!(directory[68..74], [0, 0, 0, 4, 0, 0x21]);
    assert_eq!(Registers::read(&mut f, 4, 8), Some(0x4746_4320_554d_4551));
    assert_eq!(Registers::read(&mut f, 8, 4), Some(0x4746_4320), "the bus cuts the width");
    assert_eq!(Registers::read(&mut f, 0, 2), None);
}

#[test]
fn dma_reads_skips_and_writes() {
    let (mut f, memory, seen) = device();
    assert_eq!(dma(&mut f, &memory, 0x20 << 16 | DMA_SELECT | DMA_SKIP, 1, 0), 0);
    assert_eq!(dma(&mut f, &memory, DMA_READ, 6, 0x2000), 0);
    let mut got = [9; 7];
    memory.read_slice(&mut got, GuestAddress(0x2000)).unwrap();
    assert_eq!(got, [2, 3, 4, 5, 0, 0, 0]);
    assert_eq!(dma(&mut f, &memory, 0x21 << 16 | DMA_SELECT | DMA_WRITE, 3, 0x2000), 0);
    assert_eq!(*locked(&seen), [2, 3, 4, 0]);
    assert_eq!(dma(&mut f, &memory, DMA_WRITE, 2, 0x2000), DMA_ERROR, "past the end");
    assert_eq!(dma(&mut f, &memory, 0x20 << 16 | DMA_SELECT | DMA_WRITE, 1, 0x2000), DMA_ERROR);
    assert_eq!(dma(&mut f, &memory, DMA_READ, 2, MIB - 1), DMA_ERROR);
    assert_eq!(dma(&mut f, &memory, DMA_READ, u32::MAX, u64::MAX - 4), DMA_ERROR);
    assert_eq!(dma(&mut f, &memory, DMA_READ, 0, u64::MAX), 0);
    // A structure outside RAM is dropped.
    assert!(Registers::write(&mut f, 4, 8, u64::MAX));
}

#[test]
fn bad_items_are_refused() {
    let (mut f, _, _) = device();
    let item = || Arc::new(vec![1_u8]);
    assert!(matches!(f.add_file("", item()), Err(FwCfgError::Name(_))));
    assert!(matches!(f.add_file(&"x".repeat(56), item()), Err(FwCfgError::Name(_))));
    assert!(f.add_file(&"x".repeat(55), item()).is_ok());
    assert!(matches!(f.add_file("etc/one", item()), Err(FwCfgError::Taken(_))));
    for key in [0, 0x19, 0x20, 0x3fff, 0x4005] {
        assert!(f.add_item(key, item()).is_err());
    }
    assert!(f.add_item(0x8000, item()).is_ok());
}

#[test]
fn a_saved_device_goes_on() {
    let (mut a, memory, _) = device();
    dma(&mut a, &memory, 0x21 << 16 | DMA_SELECT | DMA_WRITE, 4, 0);
    bytes(&mut a, 0x20, 2);
    let (mut b, _, _) = device();
    b.restore(a.save()).unwrap();
    assert_eq!(Registers::read(&mut b, 1, 1), Some(3));
    assert_eq!(b.save(), a.save().clone_with_offset(3));
    let mut bad = a.save();
    bad.written[0].1.push(0);
    assert!(b.restore(bad).is_err());
    DeviceState::reset(&mut b);
    assert_eq!(Registers::read(&mut b, 1, 1), Some(0x51));
}

impl FwCfgState {
    fn clone_with_offset(&self, offset: u64) -> Self {
        Self { offset, ..self.clone() }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Transfers write only where they say, and say whether they did.
    #[test]
    fn any_transfer_is_checked(ops in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u64>()), 0..20)) {
        let (mut f, memory, _) = device();
        memory.write_slice(&[0xee; 256], GuestAddress(0x8_0000)).unwrap();
        for (control, len, address) in ops {
            let control = control & 0x0021_001f;
            let (len, address) = if len & 1 == 0 { (len % 0x4000, address % 0x4_0000 + 0x1010) } else { (len, address) };
            let fits = len == 0 || memory.is_ram(address, u64::from(len));
            let far = address > 0x8_0100 || address.saturating_add(u64::from(len)) < 0x8_0000;
            let status = dma(&mut f, &memory, control, len, address);
            prop_assert!(status <= DMA_ERROR);
            if control & DMA_READ != 0 {
                prop_assert_eq!(status == 0, fits);
            }
            let mut guard = [0; 256];
            memory.read_slice(&mut guard, GuestAddress(0x8_0000)).unwrap();
            prop_assert!(!far || guard == [0xee; 256]);
            memory.write_slice(&[0xee; 256], GuestAddress(0x8_0000)).unwrap();
        }
    }
}

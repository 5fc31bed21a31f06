//! Days and dates of the proleptic Gregorian calendar, for the RTC.

/// A date and time of day in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    /// Year 0–9999.
    pub year: u32,
    /// 1–12.
    pub month: u8,
    /// 1–31.
    pub day: u8,
    /// 1 Sunday – 7 Saturday, as the RTC counts; not looked at by [`Self::to_unix`].
    pub weekday: u8,
    /// 0–23.
    pub hour: u8,
    /// 0–59.
    pub minute: u8,
    /// 0–59.
    pub second: u8,
}

const DAY: i64 = 86_400;
/// Days of 400 years, and from 0000-03-01 to 1970-01-01.
const ERA: i64 = 146_097;
const TO_1970: i64 = 719_468;

impl DateTime {
    /// The date of `unix` seconds since 1970 (years outside 0–9999 wrap).
    ///
    /// Years count from March, so that the leap day is a year's last one.
    pub(super) fn from_unix(unix: i64) -> Self {
        let (days, seconds) = (unix.div_euclid(DAY), unix.rem_euclid(DAY));
        let z = days + TO_1970;
        let (era, day_of_era) = (z.div_euclid(ERA), z.rem_euclid(ERA));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let small = |v: i64| u8::try_from(v).unwrap_or(0);
        Self {
            year: u32::try_from(year.rem_euclid(10_000)).unwrap_or(0),
            month: small(month),
            day: small(day),
            // 1970-01-01 was a Thursday, day 5.
            weekday: small((days + 4).rem_euclid(7) + 1),
            hour: small(seconds / 3_600),
            minute: small(seconds / 60 % 60),
            second: small(seconds % 60),
        }
    }

    /// Seconds since 1970. Fields outside their ranges (a guest may write anything) carry over.
    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month);
        let year = i64::from(self.year) + (month - 1).div_euclid(12);
        let month = (month - 1).rem_euclid(12) + 1;
        let y = if month <= 2 { year - 1 } else { year };
        let march_month = (month + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let days = 365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + day_of_year - TO_1970;
        days * DAY + i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_dates() {
        let known = [
            (0, (1970, 1, 1, 5, 0, 0, 0)),
            (951_782_400, (2000, 2, 29, 3, 0, 0, 0)),
            (1_709_251_199, (2024, 2, 29, 5, 23, 59, 59)),
            (4_107_542_400, (2100, 3, 1, 2, 0, 0, 0)),
            (-1, (1969, 12, 31, 4, 23, 59, 59)),
        ];
        for (unix, (year, month, day, weekday, hour, minute, second)) in known {
            let t = DateTime { year, month, day, weekday, hour, minute, second };
            assert_eq!(DateTime::from_unix(unix), t);
            assert_eq!(t.to_unix(), unix);
        }
    }

    proptest! {
        #[test]
        fn there_and_back(unix in -60_000_000_000_i64..250_000_000_000) {
            prop_assert_eq!(DateTime::from_unix(unix).to_unix(), unix);
        }
    }
}

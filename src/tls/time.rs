//! Dates of certificates, for people and for comparing.

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::error::ErrorStack;

/// Seconds since 1970 of a certificate's date.
pub fn unix(time: &Asn1TimeRef) -> Result<i64, ErrorStack> {
    let diff = Asn1Time::from_unix(0)?.diff(time)?;
    Ok(i64::from(diff.days) * DAY + i64::from(diff.secs))
}

/// Handles a date. The C library looks for the host's time zone at the first one, for which it opens a file: a process
/// that is about to lose that gets over with it here.
pub fn first_date() {
    let _ = Asn1Time::from_unix(0);
}

/// The wall clock, in seconds since 1970. Certificates are judged by it, what stands for them, and how long a lease was
/// unused; no timer is.
pub fn wall_clock() -> i64 {
    match std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
    }
}

/// `2026-11-21 08:53:57 UTC`.
pub fn utc(unix: i64) -> String {
    let (day, second) = (unix.div_euclid(DAY), unix.rem_euclid(DAY));
    format!("{} {:02}:{:02}:{:02} UTC", civil(day), second / 3600, second / 60 % 60, second % 60)
}

/// `2026-11-21`, in UTC.
pub fn date(unix: i64) -> String {
    civil(unix.div_euclid(DAY))
}

/// Year, month and day of a day counted from 1970-01-01, in 400-year eras that begin in March
/// (Howard Hinnant, chrono-compatible low-level date algorithms, `civil_from_days`).
fn civil(day: i64) -> String {
    let from_march_0000 = day + 719_468;
    let (era, day_of_era) = (from_march_0000.div_euclid(146_097), from_march_0000.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day_of_month:02}")
}

/// Seconds of a day.
pub const DAY: i64 = 86_400;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (-1, "1969-12-31 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (253_402_300_799, "9999-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(unix), text);
        }
    }

    #[test]
    fn asn1_times_keep_their_second() {
        for seconds in [0, 1, 86_399, 1_700_000_001, 2_524_608_000] {
            let time = Asn1Time::from_unix(seconds).expect("a time");
            assert_eq!(unix(&time).expect("a difference"), seconds);
        }
    }
}

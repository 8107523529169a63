//! See bodies/wire.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tunguard_fuzz::bodies::wire::control(data));

//! See bodies/wake.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tunguard_fuzz::bodies::wake::body(data));

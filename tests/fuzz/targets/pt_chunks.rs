#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| scorer_fuzz::pt_chunks(data));

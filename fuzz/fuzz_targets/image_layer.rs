#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| krx_fuzz::image_layer(data));

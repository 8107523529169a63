//! What this machine's processor has.

use crate::wire::control::FEATURE_AES_HARDWARE;

/// The `FEATURE_*` bits of this machine.
pub fn features() -> u64 {
    if aes() { FEATURE_AES_HARDWARE } else { 0 }
}

#[cfg(target_arch = "x86_64")]
fn aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn aes() -> bool {
    false
}

//! Random bytes from the system.

use ring::rand::{SecureRandom, SystemRandom};

use crate::exit::{Failure, Outcome};

/// `N` bytes nobody can guess.
pub fn bytes<const N: usize>() -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Failure::system("get random bytes", "getrandom(2) failed"))?;
    Ok(bytes)
}

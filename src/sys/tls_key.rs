//! Private keys that OpenSSL doesn't have: it holds the public half, and calls us for what the other one would write.
//!
//! Two tables of functions do this, of RSA_meth_new(3) and EC_KEY_METHOD_new(3). OpenSSL 3 calls them deprecated, and
//! keeps them; what is meant to replace them, a provider, is a library's worth of code. Other kinds of keys (Ed25519)
//! never had such a table.

use std::ffi::{c_int, c_long, c_uchar, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use foreign_types::{ForeignType, ForeignTypeRef};
use openssl::ec::EcKey;
use openssl::error::ErrorStack;
use openssl::pkey::{Id, PKey, PKeyRef, Public};
use openssl::rsa::Rsa;
use openssl::ssl::{SslContextBuilder, SslRef};
use openssl_sys as ffi;

/// Makes the signature that is asked for; `None` where there won't be one.
pub type Sign = Box<dyn Fn() -> Option<Vec<u8>> + Send + Sync>;

/// Gives a connection a key whose public half is `public`, P-256, P-384, P-521 or RSA; `sign` makes its signatures.
///
/// `sign` isn't told what is to be signed: OpenSSL knows a digest by then, and with RSA one already padded with a salt
/// of its choice. Whoever gives `sign` knows what the connection is about to sign ([`hear_messages`]).
pub fn use_remote_key(ssl: &mut SslRef, public: &PKeyRef<Public>, sign: Sign) -> Result<(), ErrorStack> {
    // A key of our own, not OpenSSL's copy of the certificate's: it gets other functions.
    let key = match public.id() {
        Id::EC => {
            let ec = public.ec_key()?;
            let ec = EcKey::from_public_key(ec.group(), ec.public_key())?;
            let index = signers(&EC_SIGNERS, CRYPTO_EX_INDEX_EC_KEY)?;
            let method = ec_method()?;
            // SAFETY: both are valid; the method is never freed, so it outlives the key.
            ok(unsafe { EC_KEY_set_method(ec.as_ptr(), method) })?;
            let sign = Box::into_raw(Box::new(sign));
            // SAFETY: the key is valid, the index one of EC keys. From here on the key owns the box, and frees it with
            // itself (`free_sign`); where it isn't taken, it is freed here.
            if let Err(error) = ok(unsafe { EC_KEY_set_ex_data(ec.as_ptr(), index, sign.cast()) }) {
                // SAFETY: made by into_raw above, and nobody else has it.
                drop(unsafe { Box::from_raw(sign) });
                return Err(error);
            }
            PKey::from_ec_key(ec)?
        }
        Id::RSA => {
            let rsa = public.rsa()?;
            let rsa = Rsa::from_public_components(rsa.n().to_owned()?, rsa.e().to_owned()?)?;
            let index = signers(&RSA_SIGNERS, CRYPTO_EX_INDEX_RSA)?;
            let method = rsa_method()?;
            // SAFETY: as above.
            ok(unsafe { RSA_set_method(rsa.as_ptr(), method) })?;
            let sign = Box::into_raw(Box::new(sign));
            // SAFETY: as above.
            if let Err(error) = ok(unsafe { RSA_set_ex_data(rsa.as_ptr(), index, sign.cast()) }) {
                // SAFETY: made by into_raw above, and nobody else has it.
                drop(unsafe { Box::from_raw(sign) });
                return Err(error);
            }
            PKey::from_rsa(rsa)?
        }
        // The caller's callers have looked: `SigningKey` reads no other kind.
        _ => return Err(ErrorStack::get()),
    };
    // SAFETY: both are valid; OpenSSL takes a reference of its own to the key.
    ok(unsafe { ffi::SSL_use_PrivateKey(ssl.as_ptr(), key.as_ptr()) })
}

/// Has `heard` (src/tls/signing.rs) called with each handshake message of the context's connections, sent or
/// received, in plaintext and in order.
pub fn hear_messages(context: &mut SslContextBuilder) {
    // SAFETY: the context is valid, and the function has the type that is asked for.
    unsafe { SSL_CTX_set_msg_callback(context.as_ptr(), Some(on_message)) };
}

/// The hash with which the connection signs, as OpenSSL's number, once that is settled.
pub fn signature_hash(ssl: &SslRef) -> Option<c_int> {
    let mut nid: c_int = 0;
    // SAFETY: SSL_get_signature_nid(3), a macro around this: it writes one int to where it is told.
    let known = unsafe {
        ffi::SSL_ctrl(ssl.as_ptr(), SSL_CTRL_GET_SIGNATURE_NID, 0, (&raw mut nid).cast::<c_void>())
    };
    (known == 1).then_some(nid)
}

/// Has OpenSSL keep private numbers in memory that is locked, not in dumps, and between guard pages
/// (CRYPTO_secure_malloc(3)). To be called before the first of them is read.
pub fn keep_private_numbers_apart() {
    // SAFETY: takes numbers only; no other thread is there that could be using the heap it sets up. Where it fails,
    // OpenSSL goes on with ordinary memory.
    unsafe { CRYPTO_secure_malloc_init(SECURE_HEAP, SMALLEST_CHUNK) };
}

unsafe extern "C" fn on_message(
    sent: c_int,
    _version: c_int,
    kind: c_int,
    bytes: *const c_void,
    len: usize,
    ssl: *mut ffi::SSL,
    _: *mut c_void,
) {
    if kind != SSL3_RT_HANDSHAKE || bytes.is_null() || ssl.is_null() {
        return;
    }
    // SAFETY: OpenSSL gives the message's place and length, and leaves it alone until we return.
    let message = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) };
    // SAFETY: the connection whose message it is; it is there at least until we return.
    let ssl = unsafe { SslRef::from_ptr(ssl) };
    // No panic may cross OpenSSL's frames. Whoever waits for what this would have noted finds nothing.
    let _ = catch_unwind(AssertUnwindSafe(|| crate::tls::signing::heard(ssl, sent == 1, message)));
}

/// ECDSA_sign(3)'s work. `into` has room for ECDSA_size(3) bytes.
unsafe extern "C" fn ec_sign(
    _kind: c_int,
    _digest: *const c_uchar,
    _digest_len: c_int,
    into: *mut c_uchar,
    len: *mut c_uint,
    _: *const ffi::BIGNUM,
    _: *const ffi::BIGNUM,
    key: *mut ffi::EC_KEY,
) -> c_int {
    let Some(index) = EC_SIGNERS.get() else { return 0 };
    // SAFETY: the key is valid while one of its functions runs.
    let sign = unsafe { EC_KEY_get_ex_data(key, *index) };
    // SAFETY: as above.
    let room = unsafe { ECDSA_size(key) };
    // SAFETY: it is null or the box that `use_remote_key` gave to this key.
    let Some(signature) = (unsafe { signature(sign) }) else { return 0 };
    if signature.is_empty() || usize::try_from(room).is_ok_and(|room| signature.len() > room) {
        return 0;
    }
    // SAFETY: there is room, as was just seen, and the bytes are nobody else's.
    unsafe { std::ptr::copy_nonoverlapping(signature.as_ptr(), into, signature.len()) };
    // SAFETY: where the length belongs.
    unsafe { *len = signature.len() as c_uint };
    1
}

/// RSA_private_encrypt(3)'s work. `into` has room for RSA_size(3) bytes, and all of them are written.
unsafe extern "C" fn rsa_sign(
    _from_len: c_int,
    _from: *const c_uchar,
    into: *mut c_uchar,
    key: *mut ffi::RSA,
    _padding: c_int,
) -> c_int {
    let Some(index) = RSA_SIGNERS.get() else { return -1 };
    // SAFETY: the key is valid while one of its functions runs.
    let sign = unsafe { RSA_get_ex_data(key, *index) };
    // SAFETY: as above.
    let size = unsafe { ffi::RSA_size(key) };
    // SAFETY: it is null or the box that `use_remote_key` gave to this key.
    let Some(signature) = (unsafe { signature(sign) }) else { return -1 };
    if usize::try_from(size) != Ok(signature.len()) {
        return -1;
    }
    // SAFETY: there is room for as many, and the bytes are nobody else's.
    unsafe { std::ptr::copy_nonoverlapping(signature.as_ptr(), into, signature.len()) };
    size
}

/// What the key's [`Sign`] says; `sign` is null, or one that `use_remote_key` made.
unsafe fn signature(sign: *const c_void) -> Option<Vec<u8>> {
    // SAFETY: the caller's promise; the key, which is in use, owns it.
    let sign = unsafe { sign.cast::<Sign>().as_ref() }?;
    // No panic may cross OpenSSL's frames.
    catch_unwind(AssertUnwindSafe(sign)).unwrap_or_default()
}

unsafe extern "C" fn free_sign(
    _: *mut c_void,
    sign: *mut c_void,
    _: *mut ffi::CRYPTO_EX_DATA,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) {
    if !sign.is_null() {
        // SAFETY: made by into_raw in `use_remote_key`, and in one key only (`forget_sign`), which goes now.
        drop(unsafe { Box::from_raw(sign.cast::<Sign>()) });
    }
}

/// A copy of a key doesn't sign: the box has one owner.
unsafe extern "C" fn forget_sign(
    _: *mut ffi::CRYPTO_EX_DATA,
    _: *const ffi::CRYPTO_EX_DATA,
    copied: *mut *mut c_void,
    _: c_int,
    _: c_long,
    _: *mut c_void,
) -> c_int {
    // SAFETY: a pointer to the pointer that the copy is going to have (crypto/ex_data.c, CRYPTO_dup_ex_data).
    unsafe { *copied = null_mut() };
    1
}

/// Where keys of one kind have their [`Sign`].
fn signers(index: &OnceLock<c_int>, class: c_int) -> Result<c_int, ErrorStack> {
    if let Some(index) = index.get() {
        return Ok(*index);
    }
    // SAFETY: both functions keep what CRYPTO_get_ex_new_index(3) says of their kind.
    let new = unsafe {
        ffi::CRYPTO_get_ex_new_index(class, 0, null_mut(), None, Some(forget_sign), Some(free_sign))
    };
    if new < 0 {
        return Err(ErrorStack::get());
    }
    // Two threads may both make one; the loser's is never used.
    Ok(*index.get_or_init(|| new))
}

fn ec_method() -> Result<*const EcKeyMethod, ErrorStack> {
    static METHOD: OnceLock<Method<EcKeyMethod>> = OnceLock::new();
    if let Some(method) = METHOD.get() {
        return Ok(method.0);
    }
    // SAFETY: takes nothing, gives the library's own table.
    let theirs = unsafe { EC_KEY_OpenSSL() };
    // SAFETY: a copy of a valid table.
    let ours = unsafe { EC_KEY_METHOD_new(theirs) };
    if ours.is_null() {
        return Err(ErrorStack::get());
    }
    // SAFETY: the table is ours, and the function has the type that is asked for; the other two do parts of its work,
    // which nobody asks for here.
    unsafe { EC_KEY_METHOD_set_sign(ours, Some(ec_sign), null(), null()) };
    Ok(METHOD.get_or_init(|| Method(ours)).0)
}

fn rsa_method() -> Result<*const RsaMethod, ErrorStack> {
    static METHOD: OnceLock<Method<RsaMethod>> = OnceLock::new();
    if let Some(method) = METHOD.get() {
        return Ok(method.0);
    }
    // SAFETY: takes nothing, gives the library's own table.
    let theirs = unsafe { RSA_PKCS1_OpenSSL() };
    // SAFETY: a copy of a valid table.
    let ours = unsafe { RSA_meth_dup(theirs) };
    if ours.is_null() {
        return Err(ErrorStack::get());
    }
    // SAFETY: the table is ours, and the function has the type that is asked for.
    ok(unsafe { RSA_meth_set_priv_enc(ours, Some(rsa_sign)) })?;
    Ok(METHOD.get_or_init(|| Method(ours)).0)
}

/// A table that is made once and never changed or freed.
struct Method<T>(*const T);

// SAFETY: what it points to is only read from the moment it is one.
unsafe impl<T> Send for Method<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Method<T> {}

fn ok(result: c_int) -> Result<(), ErrorStack> {
    if result > 0 { Ok(()) } else { Err(ErrorStack::get()) }
}

static EC_SIGNERS: OnceLock<c_int> = OnceLock::new();
static RSA_SIGNERS: OnceLock<c_int> = OnceLock::new();

// Of include/openssl/crypto.h, ssl.h and ssl3.h.
const CRYPTO_EX_INDEX_EC_KEY: c_int = 8;
const CRYPTO_EX_INDEX_RSA: c_int = 9;
const SSL_CTRL_GET_SIGNATURE_NID: c_int = 132;
const SSL3_RT_HANDSHAKE: c_int = 22;

/// Bytes, a power of two: an RSA key of 4,096 bits has 3,000 of them, and the sum of what signing copies.
const SECURE_HEAP: usize = 1 << 16;
const SMALLEST_CHUNK: usize = 32;

#[repr(C)]
struct EcKeyMethod([u8; 0]);
#[repr(C)]
struct RsaMethod([u8; 0]);

type EcSign = unsafe extern "C" fn(
    c_int,
    *const c_uchar,
    c_int,
    *mut c_uchar,
    *mut c_uint,
    *const ffi::BIGNUM,
    *const ffi::BIGNUM,
    *mut ffi::EC_KEY,
) -> c_int;
type RsaSign = unsafe extern "C" fn(c_int, *const c_uchar, *mut c_uchar, *mut ffi::RSA, c_int) -> c_int;
type OnMessage = unsafe extern "C" fn(c_int, c_int, c_int, *const c_void, usize, *mut ffi::SSL, *mut c_void);

// Of include/openssl/crypto.h, ec.h, rsa.h and ssl.h, the same in 3.0 and 3.6; the crate `openssl-sys` leaves them out.
unsafe extern "C" {
    fn CRYPTO_secure_malloc_init(size: usize, smallest: usize) -> c_int;
    fn EC_KEY_OpenSSL() -> *const EcKeyMethod;
    fn EC_KEY_METHOD_new(from: *const EcKeyMethod) -> *mut EcKeyMethod;
    fn EC_KEY_METHOD_set_sign(
        method: *mut EcKeyMethod,
        sign: Option<EcSign>,
        sign_setup: *const c_void,
        sign_sig: *const c_void,
    );
    fn EC_KEY_set_method(key: *mut ffi::EC_KEY, method: *const EcKeyMethod) -> c_int;
    fn EC_KEY_set_ex_data(key: *mut ffi::EC_KEY, index: c_int, data: *mut c_void) -> c_int;
    fn EC_KEY_get_ex_data(key: *const ffi::EC_KEY, index: c_int) -> *mut c_void;
    fn ECDSA_size(key: *const ffi::EC_KEY) -> c_int;
    fn RSA_PKCS1_OpenSSL() -> *const RsaMethod;
    fn RSA_meth_dup(from: *const RsaMethod) -> *mut RsaMethod;
    fn RSA_meth_set_priv_enc(method: *mut RsaMethod, sign: Option<RsaSign>) -> c_int;
    fn RSA_set_method(key: *mut ffi::RSA, method: *const RsaMethod) -> c_int;
    fn RSA_set_ex_data(key: *mut ffi::RSA, index: c_int, data: *mut c_void) -> c_int;
    fn RSA_get_ex_data(key: *const ffi::RSA, index: c_int) -> *mut c_void;
    fn SSL_CTX_set_msg_callback(context: *mut ffi::SSL_CTX, heard: Option<OnMessage>);
}

//! System call filters (seccomp(2)), made from tables of what a process may do. What isn't in its table ends a process,
//! by SIGSYS; so does any call by the numbers of another architecture (32-bit, x32).
//!
//! A table's row is a system call, what its arguments have to be, and why the process needs it. Only numbers can be
//! looked at, never what a pointer leads to. Arguments are compared by their lower 32 bits: all that are looked at here
//! are `int`s, of which the kernel takes no more.
//!
//! Filters add up: the kernel asks all that were installed, and the strictest answer counts.

mod common;
pub mod holder;
pub mod lookup;
pub mod tunnel;
pub mod worker;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::exit::{Exit, Failure, Outcome};

/// What it means that a filtered process died by SIGSYS, as a sentence's end. The kernel writes down which call it was
/// (audit(8), or its own log), and tells nobody else.
pub const FORBIDDEN_CALL: &str =
    "a system call that its sandbox forbids (its number: `syscall=` of type=1326 in the kernel's log)";

/// A row of a table. Several rows of one call are alternatives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    number: c_long,
    arguments: Vec<Argument>,
}

/// What one argument, counted from 0, has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Argument {
    /// This.
    Is(u8, u32),
    /// Not this.
    IsNot(u8, u32),
    /// These of its bits, by a mask, must have this value.
    Bits(u8, u32, u32),
}

/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Compiles a table.
    pub fn compile(table: &[Call]) -> Outcome<Filter> {
        Filter::compile_or(SeccompAction::KillProcess, table)
    }

    /// The same, but that other calls fail with EPERM.
    pub fn compile_mild(table: &[Call]) -> Outcome<Filter> {
        Filter::compile_or(SeccompAction::Errno(libc::EPERM as u32), table)
    }

    fn compile_or(otherwise: SeccompAction, table: &[Call]) -> Outcome<Filter> {
        let failed =
            |error: seccompiler::BackendError| Failure::system("compile a system call filter", error);
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in table {
            let first = !rules.contains_key(&call.number);
            let alternatives = rules.entry(call.number).or_default();
            // No rule at all stands for a call whatever its arguments, which nothing can be an alternative to.
            if !first && (call.arguments.is_empty() || alternatives.is_empty()) {
                let text = format!("the table allows call {} at all, and with arguments", call.number);
                return Err(Failure::system("compile a system call filter", text));
            }
            if !call.arguments.is_empty() {
                let conditions = call.arguments.iter().map(condition).collect::<Result<Vec<_>, _>>();
                let rule = conditions.and_then(SeccompRule::new).map_err(failed)?;
                alternatives.push(rule);
            }
        }
        let here = std::env::consts::ARCH.try_into().map_err(failed)?;
        let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, here);
        Ok(Filter(filter.and_then(BpfProgram::try_from).map_err(failed)?))
    }

    /// Puts the filter in force for the rest of this process's life. It has to have a single thread, and to have given
    /// up new privileges.
    pub fn install(&self) -> Outcome<()> {
        seccompiler::apply_filter(&self.0)
            .map_err(|error| Failure::system("install a system call filter", error))
    }
}

fn condition(argument: &Argument) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (at, operator, value) = match *argument {
        Argument::Is(at, value) => (at, SeccompCmpOp::Eq, value),
        Argument::IsNot(at, value) => (at, SeccompCmpOp::Ne, value),
        Argument::Bits(at, mask, value) => (at, SeccompCmpOp::MaskedEq(mask.into()), value),
    };
    SeccompCondition::new(at, SeccompCmpArgLen::Dword, operator, value.into())
}

/// Whether this kernel has what [`Filter::install`] needs.
///
/// Errors: it has not; there is no running without.
pub fn require() -> Outcome<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32, which outlives the call.
    let there =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if there == 0 {
        return Ok(());
    }
    let text = format!(
        "this kernel can't filter system calls (CONFIG_SECCOMP_FILTER): {}",
        io::Error::last_os_error()
    );
    Err(Failure::new(Exit::System, text))
}

/// Reads back that this process is filtered. The filter must allow the question.
pub fn confirm() -> Outcome<()> {
    // SAFETY: PR_GET_SECCOMP takes and returns numbers only.
    let mode = unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) };
    if mode == libc::SECCOMP_MODE_FILTER as libc::c_int {
        return Ok(());
    }
    Err(Failure::system("install a system call filter", "the kernel says that there is none"))
}

// What tables are written with.

fn allow(number: c_long, arguments: &[Argument]) -> Call {
    Call { number, arguments: arguments.to_vec() }
}

fn is(at: u8, value: libc::c_int) -> Argument {
    Argument::Is(at, value as u32)
}

fn is_not(at: u8, value: libc::c_int) -> Argument {
    Argument::IsNot(at, value as u32)
}

/// Of these bits, exactly those.
fn bits(at: u8, mask: libc::c_int, value: libc::c_int) -> Argument {
    Argument::Bits(at, mask as u32, value as u32)
}

fn has(at: u8, bits: libc::c_int) -> Argument {
    Argument::Bits(at, bits as u32, bits as u32)
}

fn lacks(at: u8, bits: libc::c_int) -> Argument {
    Argument::Bits(at, bits as u32, 0)
}

/// The first argument is this descriptor.
fn on(fd: BorrowedFd<'_>) -> Argument {
    is(0, fd.as_raw_fd())
}

#[cfg(test)]
mod tests;

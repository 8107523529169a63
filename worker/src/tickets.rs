//! What a client's ticket stands for: asked of the guard, from inside the handshake.

use std::sync::{Arc, OnceLock};

use tunguard::ipc::{Reply, Request, WorkerEnd};
use tunguard::sys::seqpacket::Incoming;
use tunguard::time::Time;
use tunguard::tls::tickets::LookUp;
use tunguard::tls::{SavedSession, TicketId};
use tunguard::wire::control::Reason;

/// The way to ask, for one handshake.
pub struct Tickets {
    /// To be given to the handshake.
    pub look_up: LookUp,
    /// The guard's order to end, if it came in place of its answer.
    pub ordered: Arc<OnceLock<Reason>>,
}

impl Tickets {
    /// Asks `guard`, until `deadline`.
    pub fn new(guard: &'static WorkerEnd, deadline: Time) -> Tickets {
        let ordered = Arc::new(OnceLock::new());
        let order = ordered.clone();
        let look_up: LookUp = Box::new(move |id| ask(guard, id, deadline, &order));
        Tickets { look_up, ordered }
    }
}

/// The handshake can do nothing else meanwhile, and neither has this process: it has one client.
fn ask(guard: &WorkerEnd, id: TicketId, deadline: Time, order: &OnceLock<Reason>) -> Option<SavedSession> {
    let sent = |request: &Request| matches!(guard.send(request, &[]), Ok(true));
    if !sent(&Request::Redeem(id)) {
        return None;
    }
    loop {
        match guard.wait(deadline) {
            Ok(Incoming::Message(Reply::Redeemed(session), _)) => return session,
            Ok(Incoming::Message(Reply::Query, _)) if sent(&Request::Report(Box::default())) => {}
            Ok(Incoming::Message(Reply::End(reason), _)) => {
                let _ = order.set(reason);
                return None;
            }
            _ => return None,
        }
    }
}

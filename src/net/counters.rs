//! What the kernel counts of a device, from /proc/net/dev: it is there in every namespace, unlike /sys.

use std::fs;

/// Packets that the tunnel device `name` had no room for, because whoever reads it didn't keep up (tun_net_xmit() in
/// drivers/net/tun.c); none where the kernel doesn't say.
pub fn device_full(name: &str) -> Option<u64> {
    sent_dropped(&fs::read_to_string("/proc/thread-self/net/dev").ok()?, name)
}

fn sent_dropped(table: &str, name: &str) -> Option<u64> {
    let columns = table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    columns.split_whitespace().nth(SENT_DROPPED)?.parse().ok()
}

/// Behind eight columns of what was received: bytes, packets, errors, dropped.
const SENT_DROPPED: usize = 11;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_column_is_found() {
        let table = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     168       2    0    0    0     0          0         0      168       2    0    0    0     0       0          0\n   \
            tg0: 14976400    6472    0    7    0     0          0         0 12033044    4940    0 1295    0     0       0          0\n";
        assert_eq!(sent_dropped(table, "tg0"), Some(1295));
        assert_eq!(sent_dropped(table, "lo"), Some(0));
        assert_eq!(sent_dropped(table, "tg"), None);
    }
}

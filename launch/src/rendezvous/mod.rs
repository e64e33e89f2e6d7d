//! Ranks that meet over TCP, for jobs without MPI, and the small messages that they then exchange.
//!
//! | file | owns |
//! |---|---|
//! | this | [`Group`]: what ranks do once they have met |
//! | `meet` | [`Meeting`]: coming together, and what keeps ranks from it |
//! | `address` | where: `MASTER_ADDR` and `MASTER_PORT`, or what Slurm says |
//! | `frame` | how one message is written |
//!
//! A star: rank 0 hears everybody and answers everybody, so it is the one that notices who is gone, and
//! tells the others. It trusts whoever reaches its port, as NCCL and MPI do: it belongs in a cluster's own
//! network. Jobs of one machine listen on its loopback device alone.

mod address;
mod frame;
mod meet;

pub(crate) use address::Address;
use frame::Frame;
pub use meet::Meeting;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// How long a last word to a rank may take to send: it may be stopped, with its buffers full.
const LAST_WORD: Duration = Duration::from_secs(1);

/// A rank that is gone, or is doing something else than the others.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank}: {message}")]
pub struct Lost {
    /// Which.
    pub rank: usize,
    /// What was seen of it.
    pub message: String,
}

/// What the ranks are doing together, so that one which does something else is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Group::gather`].
    Gather,
    /// [`Group::broadcast`].
    Broadcast,
    /// A sum of equally long vectors.
    Sum,
}

impl Call {
    const ALL: [Self; 3] = [Self::Gather, Self::Broadcast, Self::Sum];

    fn kind(self) -> u8 {
        frame::FIRST_CALL + self as u8
    }

    fn of(kind: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|call| call.kind() == kind)
    }
}

/// Ranks that have met. Every one of them must make the same calls in the same order.
#[derive(Debug)]
pub struct Group {
    rank: usize,
    world: usize,
    role: Role,
    failed: Option<Lost>,
}

#[derive(Debug)]
enum Role {
    /// Rank 0: the streams of ranks 1.. in order, and what threads have read from them.
    Hub { peers: Vec<TcpStream>, events: Receiver<Event> },
    /// Any other: the stream to rank 0.
    Leaf(TcpStream),
}

/// What one rank sent, or how its stream ended.
type Event = (usize, io::Result<Frame>);

impl Group {
    fn hub(peers: Vec<TcpStream>) -> io::Result<Self> {
        let (sender, events) = channel();
        for (i, peer) in peers.iter().enumerate() {
            read_all(i + 1, peer.try_clone()?, sender.clone())?;
        }
        let world = peers.len() + 1;
        Ok(Self { rank: 0, world, role: Role::Hub { peers, events }, failed: None })
    }

    fn leaf(rank: usize, world: usize, hub: TcpStream) -> Self {
        Self { rank, world, role: Role::Leaf(hub), failed: None }
    }

    /// Own number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Gives every rank the answer that rank 0 makes with `combine` of its own bytes and those of ranks
    /// 1, 2, ... in order.
    ///
    /// # Errors
    /// When a rank is gone or in another call; it is named on every rank. No call succeeds after that.
    pub fn exchange(
        &mut self,
        call: Call,
        mine: &[u8],
        combine: impl FnOnce(&[u8], Vec<Vec<u8>>) -> Result<Vec<u8>, Lost>,
    ) -> Result<Vec<u8>, Lost> {
        if let Some(lost) = &self.failed {
            return Err(lost.clone());
        }
        let result = match &mut self.role {
            Role::Hub { peers, events } => collect(events, peers.len(), call)
                .and_then(|theirs| combine(mine, theirs))
                .and_then(|answer| send_all(peers, call, &answer).map(|()| answer)),
            Role::Leaf(hub) => ask(hub, call, mine),
        };
        if let Err(lost) = &result {
            self.fail(lost);
        }
        result
    }

    /// The bytes of every rank, in rank order; lengths may differ.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    pub fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Lost> {
        let packed = self.exchange(Call::Gather, mine, |mine, theirs| {
            let mut packed = Vec::new();
            for part in std::iter::once(mine).chain(theirs.iter().map(Vec::as_slice)) {
                packed.extend((part.len() as u64).to_le_bytes());
                packed.extend(part);
            }
            Ok(packed)
        })?;
        unpack(&packed, self.world).ok_or_else(|| Lost {
            rank: 0,
            message: format!("its answer of {} bytes is no list of {}", packed.len(), self.world),
        })
    }

    /// Rank 0's bytes; what the others give is not looked at.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    pub fn broadcast(&mut self, mine: &[u8]) -> Result<Vec<u8>, Lost> {
        let mine = if self.rank == 0 { mine } else { &[] };
        self.exchange(Call::Broadcast, mine, |mine, _| Ok(mine.to_vec()))
    }

    /// Tells the others that this rank ends, and why: they name it instead of a closed connection.
    pub fn leave(&mut self, why: &str) {
        if self.failed.is_none() {
            self.fail(&Lost { rank: self.rank, message: why.into() });
        }
    }

    /// Remembers a failure. Rank 0 passes it on; so does the rank that fails.
    fn fail(&mut self, lost: &Lost) {
        self.failed = Some(lost.clone());
        let mut payload = (lost.rank as u32).to_le_bytes().to_vec();
        payload.extend(lost.message.as_bytes());
        let listeners = match &mut self.role {
            Role::Hub { peers, .. } => peers.as_mut_slice(),
            Role::Leaf(hub) if lost.rank == self.rank => std::slice::from_mut(hub),
            Role::Leaf(_) => &mut [],
        };
        for stream in listeners {
            // Who does not hear it any more sees the connection end instead.
            let _ = stream.set_write_timeout(Some(LAST_WORD));
            let _ = frame::write(stream, frame::LOST, &payload);
        }
    }
}

impl Drop for Group {
    /// Ends the reading threads. What was sent still arrives.
    fn drop(&mut self) {
        if let Role::Hub { peers, .. } = &self.role {
            for peer in peers {
                // A stream that has ended already needs no ending.
                let _ = peer.shutdown(Shutdown::Both);
            }
        }
    }
}

/// One thread for each rank, so that an end is seen whoever is being waited for.
fn read_all(rank: usize, mut stream: TcpStream, events: Sender<Event>) -> io::Result<()> {
    let read = move || {
        loop {
            let frame = frame::read(&mut stream);
            let ended = frame.is_err();
            if events.send((rank, frame)).is_err() || ended {
                return;
            }
        }
    };
    std::thread::Builder::new().name(format!("rank {rank}")).spawn(read).map(|_| ())
}

/// On rank 0: what every other rank gives to `call`.
fn collect(events: &Receiver<Event>, peers: usize, call: Call) -> Result<Vec<Vec<u8>>, Lost> {
    let mut given: Vec<Option<Vec<u8>>> = vec![None; peers];
    while given.iter().any(Option::is_none) {
        let Ok((rank, frame)) = events.recv() else {
            return Err(Lost { rank: 0, message: "reads no other rank any more".into() });
        };
        let frame = frame.map_err(|error| ended(rank, &error))?;
        match (frame.kind, Call::of(frame.kind)) {
            (frame::LOST, _) => return Err(last_word(rank, &frame.payload)),
            (_, Some(other)) if other == call && given[rank - 1].is_none() => {
                given[rank - 1] = Some(frame.payload);
            }
            (kind, other) => {
                let other = other.map_or(format!("{kind}"), |other| format!("{other:?}"));
                let message = format!("is at {other} where rank 0 is at {call:?}");
                return Err(Lost { rank, message });
            }
        }
    }
    Ok(given.into_iter().flatten().collect())
}

fn send_all(peers: &mut [TcpStream], call: Call, answer: &[u8]) -> Result<(), Lost> {
    for (i, peer) in peers.iter_mut().enumerate() {
        frame::write(peer, call.kind(), answer).map_err(|error| ended(i + 1, &error))?;
    }
    Ok(())
}

/// On any other rank: gives rank 0 `mine` and waits for its answer.
fn ask(hub: &mut TcpStream, call: Call, mine: &[u8]) -> Result<Vec<u8>, Lost> {
    // If it cannot be written to, it may have said why before.
    let sent = frame::write(hub, call.kind(), mine);
    let answer =
        frame::read(hub).map_err(|error| ended(0, sent.as_ref().err().unwrap_or(&error)))?;
    match answer.kind {
        frame::LOST => Err(last_word(0, &answer.payload)),
        kind if kind == call.kind() => Ok(answer.payload),
        kind => Err(Lost { rank: 0, message: format!("answered {call:?} with {kind}") }),
    }
}

fn ended(rank: usize, error: &io::Error) -> Lost {
    Lost { rank, message: format!("its connection has ended ({error}); see its own output") }
}

fn last_word(from: usize, payload: &[u8]) -> Lost {
    let Some((rank, message)) = payload.split_first_chunk() else {
        return Lost { rank: from, message: "ended without a word".into() };
    };
    let message = String::from_utf8_lossy(message).into_owned();
    Lost { rank: u32::from_le_bytes(*rank) as usize, message }
}

fn unpack(mut packed: &[u8], count: usize) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::with_capacity(count);
    while let Some((length, rest)) = packed.split_first_chunk() {
        let (part, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        parts.push(part.to_vec());
        packed = rest;
    }
    (packed.is_empty() && parts.len() == count).then_some(parts)
}

#[cfg(test)]
mod tests;

//! Coming together: rank 0 listens, the others knock until it opens, and each says who it is.
//!
//! Refuses a group that is not whole: a rank that is missing, that came twice, or that thinks the world is
//! of another size ends the meeting for all of them, with the same words.

use super::{Address, Group, frame, last_word};
use crate::{Identity, LaunchError};
use rustix::net::sockopt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How ranks recognise each other.
const MAGIC: [u8; 7] = *b"allreel";
/// Counts what ranks could say to each other and would not understand.
const VERSION: u8 = 1;
/// How long the others are waited for, unless `ALLREEL_RENDEZVOUS_TIMEOUT` gives seconds: a batch
/// system may start the nodes of a job minutes apart.
const TIMEOUT: usize = 300;
/// Pause between two looks at the door.
const KNOCK: Duration = Duration::from_millis(20);
/// How long one attempt to connect, or a stranger's silence, may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// A meeting to go to.
#[derive(Clone, Debug)]
pub struct Meeting {
    rank: usize,
    world: usize,
    address: Address,
    timeout: Duration,
}

impl Meeting {
    /// The meeting that the environment names for this rank.
    ///
    /// # Errors
    /// If it names none, or half of one.
    pub fn from_env(identity: &Identity) -> Result<Self, LaunchError> {
        Self::from_lookup(identity, |name| std::env::var(name).ok())
    }

    /// The same from any source of variables.
    ///
    /// # Errors
    /// As [`Meeting::from_env`].
    pub fn from_lookup(
        identity: &Identity,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, LaunchError> {
        let Identity { rank, world, .. } = *identity;
        let address =
            Address::from_lookup(&get)?.ok_or(LaunchError::NoMeetingPlace { rank, world })?;
        let seconds = crate::identity::number("ALLREEL_RENDEZVOUS_TIMEOUT", &get)?;
        let timeout = Duration::from_secs(seconds.unwrap_or(TIMEOUT) as u64);
        Ok(Self { rank, world, address, timeout })
    }

    /// Waits for all ranks; returns what they then are.
    ///
    /// # Errors
    /// If they do not all come, or do not fit together.
    pub fn meet(&self) -> Result<Group, LaunchError> {
        let deadline = Instant::now() + self.timeout;
        match self.rank {
            0 => self.host(deadline),
            _ => self.join(deadline),
        }
    }

    fn error(&self, reason: impl Into<String>) -> LaunchError {
        LaunchError::Rendezvous { address: self.address.to_string(), reason: reason.into() }
    }

    /// Rank 0's part.
    fn host(&self, deadline: Instant) -> Result<Group, LaunchError> {
        let listener = self.listen()?;
        let mut peers: Vec<Option<TcpStream>> = (1..self.world).map(|_| None).collect();
        while peers.iter().any(Option::is_none) {
            let refusal = match listener.accept() {
                Ok((stream, from)) => match greet(stream) {
                    Ok((stream, hello)) => self.seat(&mut peers, stream, hello, &from.to_string()),
                    // No rank of ours, or one that is gone again and will knock once more.
                    Err(_) => Ok(()),
                },
                Err(error) if error.kind() != ErrorKind::WouldBlock => {
                    return Err(LaunchError::io("accept other ranks")(error));
                }
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(KNOCK);
                    Ok(())
                }
                Err(_) => Err(self.missing(&peers)),
            };
            refusal.map_err(|reason| self.dissolve(&mut peers, &reason))?;
        }
        self.welcome(peers.into_iter().flatten().collect())
    }

    fn listen(&self) -> Result<TcpListener, LaunchError> {
        let places = self.address.to_listen_on();
        let listener = TcpListener::bind(&places[..]).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => self.error(
                "something listens there already (another job, or a second rank 0); give MASTER_PORT \
                 another free port, the same for every rank",
            ),
            _ => self.error(format!(
                "rank 0 cannot listen there ({error}); MASTER_ADDR must be a host that rank 0 runs on"
            )),
        })?;
        listener.set_nonblocking(true).map_err(LaunchError::io("wait for other ranks"))?;
        Ok(listener)
    }

    /// Gives a rank its place. One that does not fit gets one behind the others, to be told so.
    fn seat(
        &self,
        peers: &mut Vec<Option<TcpStream>>,
        stream: TcpStream,
        hello: Hello,
        from: &str,
    ) -> Result<(), String> {
        let Hello { version, rank, world } = hello;
        let refusal = if version != VERSION {
            format!(
                "rank {rank} ({from}) speaks version {version} and rank 0 version {VERSION}; start every \
                 rank with the same binary"
            )
        } else if world != self.world {
            format!(
                "rank {rank} ({from}) was started as one of {world} and rank 0 as one of {}; start \
                 every rank with the same WORLD_SIZE",
                self.world
            )
        } else if rank == 0 || rank >= world {
            format!(
                "a process came as rank {rank} of {world} ({from}); start each with its own RANK"
            )
        } else if peers[rank - 1].is_some() {
            format!(
                "two processes came as rank {rank} (one is {from}); start each with its own RANK"
            )
        } else {
            peers[rank - 1] = Some(stream);
            return Ok(());
        };
        peers.push(Some(stream));
        Err(refusal)
    }

    fn missing(&self, peers: &[Option<TcpStream>]) -> String {
        let absent: Vec<String> = (1..self.world)
            .filter(|rank| peers[rank - 1].is_none())
            .map(|rank| rank.to_string())
            .collect();
        format!(
            "of {} ranks, {} did not come within {} s; see their own output, and that MASTER_ADDR is a \
             name of rank 0's host that they can reach (ALLREEL_RENDEZVOUS_TIMEOUT waits longer)",
            self.world,
            absent.join(", "),
            self.timeout.as_secs()
        )
    }

    /// Sends everybody home with the same words; returns them as rank 0's own error.
    fn dissolve(&self, peers: &mut [Option<TcpStream>], reason: &str) -> LaunchError {
        let mut payload = 0u32.to_le_bytes().to_vec();
        payload.extend(reason.as_bytes());
        for peer in peers.iter_mut().flatten() {
            // One that is gone needs no telling.
            let _ = frame::write(peer, frame::LOST, &payload);
        }
        self.error(reason)
    }

    fn welcome(&self, mut peers: Vec<TcpStream>) -> Result<Group, LaunchError> {
        for (i, peer) in peers.iter_mut().enumerate() {
            frame::write(peer, frame::WELCOME, &[]).map_err(|error| {
                self.error(format!("rank {} came and is gone ({error}); see its own output", i + 1))
            })?;
        }
        Group::hub(peers).map_err(LaunchError::io("read from other ranks"))
    }

    /// The part of every other rank.
    fn join(&self, deadline: Instant) -> Result<Group, LaunchError> {
        loop {
            let why = match self.knock(deadline) {
                Ok((stream, answer)) if answer.kind == frame::WELCOME => {
                    stream.set_read_timeout(None).map_err(LaunchError::io("wait for rank 0"))?;
                    return Ok(Group::leaf(self.rank, self.world, stream));
                }
                Ok((_, answer)) if answer.kind == frame::LOST => {
                    return Err(self.error(last_word(0, &answer.payload).message));
                }
                Ok(_) => return Err(self.error("what answers there is no rank of ours")),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(self.error(format!(
                    "rank {} found no rank 0 there within {} s ({why}); see that rank 0 runs on that \
                     host and has the same MASTER_PORT (ALLREEL_RENDEZVOUS_TIMEOUT waits longer)",
                    self.rank,
                    self.timeout.as_secs()
                )));
            }
            std::thread::sleep(KNOCK);
        }
    }

    /// One attempt: connects, says hello, waits for the answer.
    fn knock(&self, deadline: Instant) -> io::Result<(TcpStream, frame::Frame)> {
        let mut stream = connect(&self.address)?;
        let hello = Hello { version: VERSION, rank: self.rank, world: self.world };
        stream.write_all(&hello.to_bytes())?;
        // Rank 0 answers when all have come, or at its own deadline, which may be later than ours.
        let patience = deadline.saturating_duration_since(Instant::now()) + self.timeout + ATTEMPT;
        stream.set_read_timeout(Some(patience))?;
        let answer = frame::read(&mut stream)?;
        Ok((stream, answer))
    }
}

fn connect(address: &Address) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for place in address.resolve()? {
        match TcpStream::connect_timeout(&place, ATTEMPT) {
            // With nobody listening, a connection to a port of this machine can meet itself.
            Ok(stream) if stream.local_addr()? == place => {
                last = ErrorKind::ConnectionRefused.into()
            }
            Ok(stream) => return prepare(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// No delays of small messages; a host that has vanished is noticed within two minutes, however long
/// its rank may rightly be silent.
fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(&stream, 6)?;
    Ok(stream)
}

/// What a rank says first.
#[derive(Clone, Copy)]
struct Hello {
    version: u8,
    rank: usize,
    world: usize,
}

impl Hello {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..7].copy_from_slice(&MAGIC);
        bytes[7] = self.version;
        bytes[8..12].copy_from_slice(&(self.rank as u32).to_le_bytes());
        bytes[12..].copy_from_slice(&(self.world as u32).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        let number = |at: usize| {
            bytes[at..at + 4].try_into().map_or(0, |bytes| u32::from_le_bytes(bytes) as usize)
        };
        let hello = Self { version: bytes[7], rank: number(8), world: number(12) };
        (bytes[..7] == MAGIC).then_some(hello)
    }
}

/// On rank 0: hears who knocks.
fn greet(stream: TcpStream) -> io::Result<(TcpStream, Hello)> {
    stream.set_nonblocking(false)?;
    let mut stream = prepare(stream)?;
    stream.set_read_timeout(Some(ATTEMPT))?;
    let mut hello = [0; 16];
    stream.read_exact(&mut hello)?;
    stream.set_read_timeout(None)?;
    let stranger = || io::Error::new(ErrorKind::InvalidData, "no rank of ours");
    Ok((stream, Hello::from_bytes(hello).ok_or_else(stranger)?))
}

//! Where ranks without MPI meet: `MASTER_ADDR` and `MASTER_PORT`, or what a step of Slurm implies.

use crate::LaunchError;
use crate::identity::number;
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

/// Ports that we choose ourselves lie from here, below those that Linux gives to outgoing connections.
const FIRST_PORT: usize = 20_000;
/// How many there are.
const PORTS: usize = 10_000;

/// A host and a port of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Address {
    /// The place that the environment names, if any.
    pub(super) fn from_lookup(
        get: &impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, LaunchError> {
        let (host, port) = (get("MASTER_ADDR"), number("MASTER_PORT", get)?);
        match (host, port) {
            (Some(host), Some(port)) => {
                let port = checked_port(port)?;
                // The agents of torchrun may hold the port themselves, and say so to every rank.
                let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|said| said == "True");
                let port = if taken { port.checked_add(1).unwrap_or(port - 1) } else { port };
                Ok(Some(Self { host, port }))
            }
            (Some(_), None) => {
                Err(LaunchError::MissingVariable { present: "MASTER_ADDR", absent: "MASTER_PORT" })
            }
            (None, _) => Self::of_slurm(get),
        }
    }

    /// The first host of a Slurm step, where its rank 0 is, and a port that follows from the job.
    fn of_slurm(get: &impl Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        let (Some(hosts), Some(job)) = (get("SLURM_STEP_NODELIST"), number("SLURM_JOB_ID", get)?)
        else {
            return Ok(None);
        };
        let step = number("SLURM_STEP_ID", get)?.unwrap_or(0);
        let port = (FIRST_PORT + (job * 31 + step) % PORTS) as u16;
        let port = number("MASTER_PORT", get)?.map_or(Ok(port), checked_port)?;
        Ok(Some(Self { host: first_host(&hosts), port }))
    }

    /// A port of this machine that nobody listens on. Somebody may before we do; the ranks then say so.
    pub(crate) fn free_here() -> std::io::Result<Self> {
        let host = "127.0.0.1";
        let start = std::process::id() as usize;
        let ports = (0..PORTS).map(|i| (FIRST_PORT + (start * 7 + i) % PORTS) as u16);
        let mut last = std::io::ErrorKind::AddrInUse.into();
        for port in ports {
            match std::net::TcpListener::bind((host, port)) {
                Ok(_) => return Ok(Self { host: host.into(), port }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Where rank 0 listens: on the address itself if only this machine can reach it, else on every
    /// one it has, because a host's own name may mean the loopback device to itself.
    pub(super) fn to_listen_on(&self) -> Vec<SocketAddr> {
        let literal = self.host.parse::<IpAddr>().ok();
        let local = literal.is_some_and(|ip| ip.is_loopback()) || self.host == "localhost";
        if local {
            return self.resolve().unwrap_or_default();
        }
        let any: [IpAddr; 2] = [[0u16; 8].into(), [0u8; 4].into()];
        any.map(|ip| SocketAddr::new(ip, self.port)).to_vec()
    }

    pub(super) fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        Ok((self.host.as_str(), self.port).to_socket_addrs()?.collect())
    }
}

fn checked_port(port: usize) -> Result<u16, LaunchError> {
    u16::try_from(port).ok().filter(|port| *port > 0).ok_or_else(|| LaunchError::BadVariable {
        name: "MASTER_PORT",
        value: port.to_string(),
        expected: "expected a port from 1 to 65535".into(),
    })
}

/// The first of Slurm's list of hosts, such as `gpu[03-07,11],login`.
fn first_host(list: &str) -> String {
    let mut host = String::new();
    // Inside brackets: whether the first number is still being read.
    let mut bracket = None;
    for c in list.chars() {
        match (c, bracket) {
            ('[', _) => bracket = Some(true),
            (']', _) => bracket = None,
            (',', None) => break,
            ('-' | ',', Some(_)) => bracket = Some(false),
            (_, Some(false)) => {}
            _ => host.push(c),
        }
    }
    host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<String>, LaunchError> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_string())
        };
        Address::from_lookup(&get).map(|found| found.map(|address| address.to_string()))
    }

    #[test]
    fn the_masters_variables_name_the_place() {
        let set = [("MASTER_ADDR", "head"), ("MASTER_PORT", "29500")];
        assert_eq!(read(&set).unwrap().as_deref(), Some("head:29500"));
        assert_eq!(read(&[]).unwrap(), None);
        let agent = [set[0], set[1], ("TORCHELASTIC_USE_AGENT_STORE", "True")];
        assert_eq!(read(&agent).unwrap().as_deref(), Some("head:29501"));
        let last = [("MASTER_ADDR", "::1"), ("MASTER_PORT", "65535"), agent[2]];
        assert_eq!(read(&last).unwrap().as_deref(), Some("[::1]:65534"));
        let error = read(&set[..1]).unwrap_err().to_string();
        assert!(error.contains("MASTER_PORT is not"), "{error}");
        for bad in ["0", "65536", "http"] {
            let error = read(&[set[0], ("MASTER_PORT", bad)]).unwrap_err().to_string();
            assert!(error.contains(&format!("MASTER_PORT={bad}")), "{error}");
        }
    }

    #[test]
    fn a_step_of_slurm_implies_one_and_its_steps_differ() {
        let step = |id| {
            let set = [
                ("SLURM_STEP_NODELIST", "gpu[03-07,11],login"),
                ("SLURM_JOB_ID", "123456"),
                ("SLURM_STEP_ID", id),
            ];
            read(&set).unwrap().unwrap()
        };
        assert_eq!(step("0"), "gpu03:27136");
        assert_eq!(step("1"), "gpu03:27137");
        for (list, first) in
            [("a", "a"), ("a,b", "a"), ("n[1,3]-ib", "n1-ib"), ("r[2-3]n[4-5]", "r2n4")]
        {
            assert_eq!(first_host(list), first);
        }
    }

    #[test]
    fn only_a_local_place_is_listened_on_locally() {
        let at = |host: &str| Address { host: host.into(), port: 80 }.to_listen_on();
        assert_eq!(at("127.0.0.1"), ["127.0.0.1:80".parse().unwrap()]);
        assert!(at("localhost").iter().all(|address| address.ip().is_loopback()));
        assert_eq!(at("head"), ["[::]:80".parse().unwrap(), "0.0.0.0:80".parse().unwrap()]);
    }
}

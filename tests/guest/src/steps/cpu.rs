//! `burn` and `cpu`: spinning threads, one per CPU, each bound to its CPU.

use std::hint::black_box;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::json::{self, Object};
use crate::script::Cpus;
use crate::{clock, counters};

/// Additions between two looks at the clock: far below a millisecond, even when emulated.
const BATCH: u32 = 20_000;

/// Spins for a wall time.
pub(crate) fn burn(cpus: Cpus, time: Duration) -> io::Result<Object> {
    on_each(cpus, move |cpu| spin(cpu, |start, _| start.elapsed() < time))
}

/// Spins until each thread got that much CPU time.
pub(crate) fn consume(cpus: Cpus, time: Duration) -> io::Result<Object> {
    let time_ns = clock::ns(time);
    on_each(cpus, move |cpu| spin(cpu, |_, start_ns| clock::thread_cpu_ns() - start_ns < time_ns))
}

fn on_each(
    cpus: Cpus,
    work: impl Fn(usize) -> io::Result<Object> + Copy + Send + 'static,
) -> io::Result<Object> {
    let numbers: Vec<usize> = match cpus {
        Cpus::One(cpu) => vec![cpu],
        Cpus::All => (0..thread::available_parallelism()?.get()).collect(),
    };
    let threads: Vec<_> = numbers.into_iter().map(|cpu| thread::spawn(move || work(cpu))).collect();
    let done: io::Result<Vec<Object>> =
        threads.into_iter().map(|thread| thread.join().expect("a spinning thread does not panic")).collect();
    Ok(Object::new().raw("cpus", json::array(done?)))
}

/// `wall_ns` is the guest's clock, `cpu_ns` what the guest's scheduler charged the thread, which includes time
/// stolen by the host; `unstolen_ns` leaves that out (grain of `steal_ns`: 10 ms; TCG guests have no steal).
fn spin(cpu: usize, go_on: impl Fn(Instant, u64) -> bool) -> io::Result<Object> {
    bind_to(cpu)?;
    let (start, start_ns, start_steal_ns) = (Instant::now(), clock::thread_cpu_ns(), counters::steal_ns(cpu));
    let mut additions = 0u64;
    while go_on(start, start_ns) {
        for _ in 0..BATCH {
            additions = black_box(additions + 1);
        }
    }
    let (wall_ns, cpu_ns) = (clock::ns(start.elapsed()), clock::thread_cpu_ns() - start_ns);
    let steal_ns = counters::steal_ns(cpu) - start_steal_ns;
    Ok(Object::new()
        .raw("cpu", cpu)
        .raw("wall_ns", wall_ns)
        .raw("cpu_ns", cpu_ns)
        .raw("steal_ns", steal_ns)
        .raw("unstolen_ns", cpu_ns.saturating_sub(steal_ns))
        .raw("additions", additions))
}

fn bind_to(cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is a plain bit array, for which all zeroes is the valid empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the bit lies inside the set, as just checked.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is initialised, and its own size is passed; 0 means the calling thread.
    let done = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

//! Writes records as lines of JSON to standard output or a file, on a thread of its own, so that a slow reader
//! never delays a tick. What a pipe takes at once, without waiting, is written without that thread: to wake it at
//! each tick costs more than to write.
//!
//! The queue is bounded in bytes. When it is full, lines are dropped and counted: `sample` lines first, the
//! others only when the queue is twice as full. Lines are never cut in the middle by us.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IoSlice, Write},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use rustix::{
    fs::FileType,
    io::{Errno, ReadWriteFlags},
};
use tokio::sync::oneshot;

use crate::{privilege, record::Record};

/// Bytes that may wait for the reader of the stream.
const QUEUE_BYTES: usize = 8 << 20;
/// So many bytes are handed over without waiting for more: what a pipe holds.
const BATCH_BYTES: usize = 64 << 10;

/// Why the stream cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The output file cannot be made.
    #[error("cannot write to {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot write the stream to {to}")]
    Write {
        /// File or standard output.
        to: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The reader did not take the last lines in time.
    #[error("the reader of {to} is too slow: the last {bytes} bytes of the stream were not written")]
    Slow {
        /// File or standard output.
        to: String,
        /// Bytes left.
        bytes: usize,
    },
}

/// How writing ended before we wanted it to.
#[derive(Debug)]
pub enum SinkEnd {
    /// The reader closed the pipe: that is success.
    ReaderLeft,
    /// An error.
    Failed(SinkError),
}

/// The sink.
#[derive(Debug)]
pub struct Ndjson {
    to: String,
    /// The same pipe or socket as the thread writes to, if it can be asked not to wait.
    at_once: Option<OwnedFd>,
    lines: Option<mpsc::Sender<Vec<u8>>>,
    used: mpsc::Receiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
    /// Lines that are not handed over yet, and their number.
    pending: (Vec<u8>, u64),
    ended: oneshot::Receiver<io::Result<()>>,
    written: BTreeMap<&'static str, u64>,
    dropped: u64,
}

impl Ndjson {
    /// Opens the output, `-` for standard output, and starts the thread that writes.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn open(output: &str) -> Result<Self, SinkError> {
        if output == "-" {
            let at_once = never_waits(io::stdout().as_fd());
            let this = Self::start("standard output".to_owned(), io::stdout());
            return Ok(Self { at_once, ..this });
        }
        let path = Path::new(output);
        match File::create(path) {
            Ok(file) => Ok(Self::start(output.to_owned(), file)),
            Err(source) => Err(SinkError::Open { path: path.to_owned(), source }),
        }
    }

    /// Starts the thread that writes to something open, called `to`.
    #[must_use]
    pub fn start(to: String, output: impl Write + Send + 'static) -> Self {
        let (lines, incoming) = mpsc::channel::<Vec<u8>>();
        let (give_back, used) = mpsc::channel();
        let (end, ended) = oneshot::channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&queued);
        std::thread::spawn(move || {
            // What it writes to is open; it goes on with more rights than it needs if this fails.
            let _ = privilege::give_up();
            let result = write_lines(output, &incoming, &give_back, &left);
            let _ = end.send(result);
        });
        let pending = (Vec::new(), 0);
        Self {
            to,
            at_once: None,
            lines: Some(lines),
            used,
            queued,
            pending,
            ended,
            written: BTreeMap::new(),
            dropped: 0,
        }
    }

    /// Queues one line, or drops and counts it if the reader is too far behind. It is on its way after
    /// [`Ndjson::flush`] at the latest: waking the writer for each of many lines costs more than writing them.
    pub fn write(&mut self, record: &Record<'_>) {
        let limit = if matches!(record, Record::Sample(_)) { QUEUE_BYTES } else { 2 * QUEUE_BYTES };
        let (text, lines) = &mut self.pending;
        if self.queued.load(Ordering::Relaxed) + text.len() >= limit {
            self.dropped += 1;
            return;
        }
        record.write_line(text);
        *lines += 1;
        *self.written.entry(record.name()).or_default() += 1;
        if text.len() >= BATCH_BYTES {
            self.flush();
        }
    }

    /// Hands over what was written so far.
    pub fn flush(&mut self) {
        if self.pending.1 == 0 {
            return;
        }
        self.write_at_once();
        if self.pending.0.is_empty() {
            self.pending.1 = 0;
            return;
        }
        let mut next = self.used.try_recv().unwrap_or_default();
        next.clear();
        let (text, lines) = std::mem::replace(&mut self.pending, (next, 0));
        self.queued.fetch_add(text.len(), Ordering::Relaxed);
        // It fails once writing has ended, and `ended` says why.
        if self.lines.as_ref().is_none_or(|queue| queue.send(text).is_err()) {
            self.dropped += lines;
        }
    }

    /// Writes as much as there is room for, unless something is in the queue, which goes first.
    fn write_at_once(&mut self) {
        let Some(to) = self.at_once.as_ref().filter(|_| self.queued.load(Ordering::Acquire) == 0) else {
            return;
        };
        let text = &mut self.pending.0;
        // At the position that there is none of in a pipe (`do_pwritev()`).
        match rustix::io::pwritev2(to, &[IoSlice::new(text)], u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(written) if written == text.len() => text.clear(),
            Ok(written) => drop(text.drain(..written)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A pipe cannot do so before Linux 6.4. What else it may be, the thread meets as well, and says.
            Err(_) => self.at_once = None,
        }
    }

    /// Lines queued so far, by type.
    #[must_use]
    pub fn written(&self) -> &BTreeMap<&'static str, u64> {
        &self.written
    }

    /// Lines dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Waits until writing ends by itself: the reader left, or an error.
    pub async fn ended(&mut self) -> SinkEnd {
        match (&mut self.ended).await {
            Ok(Err(source)) if source.kind() != io::ErrorKind::BrokenPipe => {
                SinkEnd::Failed(SinkError::Write { to: self.to.clone(), source })
            }
            _ => SinkEnd::ReaderLeft,
        }
    }

    /// Writes what is queued and closes the output.
    ///
    /// # Errors
    /// If writing failed, or the reader does not take the rest within `patience`.
    pub async fn finish(mut self, patience: Duration) -> Result<(), SinkError> {
        self.flush();
        self.lines = None;
        match tokio::time::timeout(patience, self.ended()).await {
            Ok(SinkEnd::Failed(error)) => Err(error),
            Ok(SinkEnd::ReaderLeft) => Ok(()),
            Err(_) => Err(SinkError::Slow { to: self.to, bytes: self.queued.load(Ordering::Relaxed) }),
        }
    }
}

/// Another descriptor of a pipe or a socket. Files are left to the thread: writing to them may wait for a disk all the
/// same.
fn never_waits(to: BorrowedFd<'_>) -> Option<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(to).ok()?.st_mode);
    matches!(kind, FileType::Fifo | FileType::Socket).then(|| to.try_clone_to_owned().ok()).flatten()
}

fn write_lines(
    mut output: impl Write,
    lines: &mpsc::Receiver<Vec<u8>>,
    give_back: &mpsc::Sender<Vec<u8>>,
    queued: &AtomicUsize,
) -> io::Result<()> {
    while let Ok(batch) = lines.recv() {
        output.write_all(&batch)?;
        output.flush()?;
        queued.fetch_sub(batch.len(), Ordering::Release);
        // Nobody writes any more: then it is not needed.
        let _ = give_back.send(batch);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Event, EventKind};

    fn event(detail: &str) -> Record<'_> {
        Record::Event(Event {
            ts: String::new(),
            mono_ns: 1,
            kind: EventKind::SourceLost,
            domain: None,
            detail,
        })
    }

    struct Failing(io::ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            loop {
                std::thread::park();
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn lines_are_whole_and_in_order_and_control_characters_are_escaped() {
        let path = std::env::temp_dir().join(format!("kvm-monitor-sink-{}", std::process::id()));
        let mut sink = Ndjson::open(path.to_str().unwrap()).unwrap();
        for i in 0..1000 {
            sink.write(&event(&format!("{i}\n\u{1b}[31m\"")));
        }
        assert_eq!(sink.written().get("event"), Some(&1000));
        sink.finish(Duration::from_secs(60)).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 1000);
        for (i, line) in text.lines().enumerate() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["detail"], format!("{i}\n\u{1b}[31m\""));
            assert!(!line.contains('\u{1b}'));
        }
    }

    /// A pipe: what it takes at once goes around the queue, what it does not goes through it, and nothing overtakes.
    #[tokio::test]
    async fn what_a_full_pipe_does_not_take_at_once_follows_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let at_once = never_waits(writer.as_fd());
        assert!(at_once.is_some());
        let mut sink = Ndjson { at_once, ..Ndjson::start("x".into(), writer) };
        let (fill, filled) = std::sync::mpsc::channel();
        let taken = std::thread::spawn(move || {
            filled.recv().unwrap(); // First it is full, then it is read while lines are written.
            let mut text = String::new();
            io::Read::read_to_string(&mut reader, &mut text).unwrap();
            text
        });
        const LINES: usize = 4000;
        for i in 0..LINES {
            sink.write(&event(&format!("{i} {}", "x".repeat(i % 300))));
            sink.flush();
            if i == LINES / 2 {
                assert!(sink.queued.load(Ordering::Relaxed) > 0, "the pipe was never full");
                fill.send(()).unwrap();
            }
        }
        assert_eq!(sink.dropped(), 0);
        sink.finish(Duration::from_secs(60)).await.unwrap();
        let text = taken.join().unwrap();
        assert_eq!(text.lines().count(), LINES);
        for (i, line) in text.lines().enumerate() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["detail"], format!("{i} {}", "x".repeat(i % 300)));
        }
    }

    #[tokio::test]
    async fn a_closed_pipe_is_success_and_a_full_disk_is_not() {
        let mut pipe = Ndjson::start("x".into(), Failing(io::ErrorKind::BrokenPipe));
        pipe.write(&event(""));
        pipe.flush();
        assert!(matches!(pipe.ended().await, SinkEnd::ReaderLeft));
        let mut disk = Ndjson::start("x".into(), Failing(io::ErrorKind::StorageFull));
        disk.write(&event(""));
        disk.flush();
        assert!(matches!(disk.ended().await, SinkEnd::Failed(SinkError::Write { .. })));
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_costs_bounded_memory_and_is_counted() {
        let mut sink = Ndjson::start("x".into(), Stuck);
        let long = "x".repeat(1 << 20);
        for _ in 0..64 {
            sink.write(&event(&long));
        }
        assert!(sink.dropped() > 0 && sink.queued.load(Ordering::Relaxed) < 2 * QUEUE_BYTES + (2 << 20));
        assert_eq!(sink.dropped() + sink.written()["event"], 64);
        let end = sink.finish(Duration::from_millis(10)).await;
        assert!(matches!(end, Err(SinkError::Slow { .. })));
    }
}

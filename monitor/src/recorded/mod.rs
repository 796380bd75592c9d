//! Feeds a stream to a comparison, line by line: a recorded one (plain or zstd), or the one being made.
//!
//! Memory does not grow with the length of the stream. A line that is no good is noted with its number, and the
//! rest is used.

mod zstd;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    compare::{Comparison, Report, input::Kind, truth::Truth},
    record::read::{Line, LineError, SampleLine, begins_inside, parse},
};

/// Bytes read at once.
const CHUNK: usize = 1 << 18;
/// No line of ours is longer: a domain with thousands of devices has some MB.
const LONGEST_LINE: usize = 64 << 20;

/// Why nothing can be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The file cannot be opened.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file of ground truth is wrong.
    #[error("{}: {reason}", path.display())]
    Truth {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No line at all.
    #[error("{} is empty: record a stream with `kvm-monitor run --output FILE`", .0.display())]
    Empty(PathBuf),
}

/// Takes bytes of a stream and compares its lines.
#[derive(Debug, Default)]
pub struct Feed {
    comparison: Comparison,
    sample: SampleLine,
    /// The begin of a line whose end has not come yet.
    partial: Vec<u8>,
    /// In the middle of a line that is too long.
    skipping: bool,
    only: Vec<String>,
}

impl Feed {
    /// Compares all domains, or only those of these names or UUIDs.
    #[must_use]
    pub fn new(truths: Vec<Truth>, only: Vec<String>) -> Self {
        Self { comparison: Comparison::new(truths), only, ..Self::default() }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        self.comparison.input.bytes += u64::try_from(bytes.len()).unwrap_or(0);
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.partial.is_empty() && !self.skipping {
                self.line(line);
            } else {
                self.keep(line);
                let whole = std::mem::take(&mut self.partial);
                if std::mem::take(&mut self.skipping) {
                    self.comparison.input.lines += 1;
                } else {
                    self.line(&whole);
                }
                self.partial = whole;
                self.partial.clear();
            }
            bytes = rest;
        }
        self.keep(bytes);
    }

    /// The stream ends here.
    #[must_use]
    pub fn finish(mut self, limit_pct: Option<f64>) -> Report {
        if !self.partial.is_empty() {
            let last = std::mem::take(&mut self.partial);
            self.line(&last);
        }
        self.comparison.finish(limit_pct)
    }

    fn keep(&mut self, part: &[u8]) {
        if self.skipping {
            return;
        }
        if self.partial.len() + part.len() > LONGEST_LINE {
            let number = self.comparison.input.lines + 1;
            self.comparison.input.note(Kind::TooLong, number, || format!("over {LONGEST_LINE} bytes"));
            self.skipping = true;
            self.partial = Vec::new();
            return;
        }
        self.partial.extend_from_slice(part);
    }

    fn line(&mut self, line: &[u8]) {
        self.comparison.input.lines += 1;
        let number = self.comparison.input.lines;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.trim_ascii().is_empty() {
            return;
        }
        let error = match parse(line, &mut self.sample) {
            Ok(parsed) => return self.take(number, parsed),
            Err(error) => error,
        };
        let inside = begins_inside(line).and_then(|at| parse(&line[at..], &mut self.sample).ok());
        let kind = match (&inside, &error) {
            (Some(_), _) => Kind::Interleaved,
            (None, LineError::Truncated(_)) => Kind::Truncated,
            (None, LineError::NotJson(_))
                if line.starts_with(b"{\"type\":") && begins_inside(line).is_some() =>
            {
                Kind::Interleaved
            }
            (None, LineError::NotJson(_)) => Kind::NotJson,
            (None, LineError::Shape(_)) => Kind::NotAStream,
        };
        self.comparison.input.note(kind, number, || crate::visible(&error.to_string()));
        if let Some(parsed) = inside {
            self.take(number, parsed);
        }
    }

    fn take(&mut self, number: u64, line: Line) {
        if matches!(line, Line::Sample) && !self.wanted() {
            return;
        }
        if let Line::Domain(domain) = &line
            && !self.only.is_empty()
            && !self.only.iter().any(|o| *o == domain.domain.name || *o == domain.domain.uuid)
        {
            return;
        }
        self.comparison.take(number, line, &self.sample);
    }

    fn wanted(&self) -> bool {
        let uuid = self.sample.uuid.map(|u| u.to_string());
        self.only.is_empty() || self.only.iter().any(|o| *o == self.sample.name || Some(o) == uuid.as_ref())
    }
}

/// Compares a recorded stream.
///
/// # Errors
/// If it cannot be read or is empty.
pub fn compare_file(path: &Path, mut feed: Feed, limit_pct: Option<f64>) -> Result<Report, CompareError> {
    let failed = |source| CompareError::Read { path: path.to_owned(), source };
    let file: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let file = File::open(path).map_err(failed)?;
        if file.metadata().is_ok_and(|m| m.is_dir()) {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        Box::new(file)
    };
    let mut file = BufReader::with_capacity(CHUNK, file);
    if zstd::is_compressed(file.fill_buf().map_err(failed)?) {
        zstd::decompress(&mut file, &mut feed).map_err(failed)?;
    } else {
        loop {
            let chunk = file.fill_buf().map_err(failed)?;
            if chunk.is_empty() {
                break;
            }
            feed.push(chunk);
            let length = chunk.len();
            file.consume(length);
        }
    }
    if feed.comparison.input.bytes == 0 && feed.comparison.input.problems.is_empty() {
        return Err(CompareError::Empty(path.to_owned()));
    }
    Ok(feed.finish(limit_pct))
}

/// Reads a file of ground truth: a JSON array.
///
/// # Errors
/// If it cannot be read or is wrong.
pub fn read_truths(path: &Path) -> Result<Vec<Truth>, CompareError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| CompareError::Read { path: path.to_owned(), source })?;
    let wrong = |reason| CompareError::Truth { path: path.to_owned(), reason };
    let truths: Vec<Truth> = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    match truths.iter().find(|t| crate::compare::truth::Watch::new((*t).clone()).def().is_none()) {
        Some(unknown) => Err(wrong(format!("no metric {:?} in {:?}", unknown.metrics, unknown.scope))),
        None => Ok(truths),
    }
}

/// A feed that the sink of `run` writes to, on a thread of its own.
#[derive(Clone, Debug, Default)]
pub struct SharedFeed(Arc<Mutex<Feed>>);

impl SharedFeed {
    /// Shares a feed.
    #[must_use]
    pub fn new(feed: Feed) -> Self {
        Self(Arc::new(Mutex::new(feed)))
    }

    /// The feed; what is written from now on is lost.
    #[must_use]
    pub fn take(&self) -> Feed {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Feed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SharedFeed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

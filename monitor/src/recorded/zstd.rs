//! Decompresses zstd frames one after the other, as `zstd`, `zstd -T0` and appended files make them.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{
    FrameDecoder, StreamingDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use super::Feed;
use crate::compare::input::Kind;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Of the 16 kinds of frames that hold no data.
const SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// The window of `zstd --long=27`; the program's own limit too.
const LARGEST_WINDOW: u64 = 128 << 20;

/// Whether a file that begins so is compressed.
pub(super) fn is_compressed(begin: &[u8]) -> bool {
    let skippable = begin.len() >= 4 && begin[0] & 0xf0 == 0x50 && begin[1..4] == SKIPPABLE;
    begin.starts_with(&MAGIC) || skippable
}

/// Feeds what a file contains. Damage ends it, and is noted.
pub(super) fn decompress(file: &mut impl BufRead, feed: &mut Feed) -> io::Result<()> {
    let mut chunk = vec![0; super::CHUNK];
    while !file.fill_buf()?.is_empty() {
        if let Err(reason) = frame(file, feed, &mut chunk) {
            let line = feed.comparison.input.lines + 1;
            feed.comparison.input.note(Kind::Compression, line, || reason);
            return Ok(());
        }
    }
    Ok(())
}

fn frame(file: &mut impl BufRead, feed: &mut Feed, chunk: &mut [u8]) -> Result<(), String> {
    let mut decoder = match StreamingDecoder::new_with_max_window_size(&mut *file, LARGEST_WINDOW) {
        Ok(decoder) => decoder,
        Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
            let skipped = io::copy(&mut file.take(length.into()), &mut io::sink());
            return skipped.map(drop).map_err(|e| e.to_string());
        }
        Err(error) => return Err(error.to_string()),
    };
    loop {
        match decoder.read(chunk) {
            Ok(0) => return checked(&decoder.decoder),
            Ok(length) => feed.push(&chunk[..length]),
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn checked(decoder: &FrameDecoder) -> Result<(), String> {
    match (decoder.get_checksum_from_data(), decoder.get_calculated_checksum()) {
        (Some(stored), Some(found)) if stored != found => Err("its checksum is wrong".to_owned()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn feed(bytes: &[u8]) -> Feed {
        let mut feed = Feed::default();
        decompress(&mut io::BufReader::with_capacity(7, bytes), &mut feed).unwrap();
        feed
    }

    fn compressed(text: &str) -> Vec<u8> {
        compress_to_vec(text.as_bytes(), CompressionLevel::Fastest)
    }

    #[test]
    fn frames_follow_each_other_and_empty_ones_are_skipped() {
        let mut bytes = compressed("a\nb\n");
        bytes.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
        bytes.extend(compressed("c\n"));
        assert!(is_compressed(&bytes) && is_compressed(&bytes[bytes.len() - compressed("c\n").len()..]));
        let feed = feed(&bytes);
        assert_eq!((feed.comparison.input.lines, feed.comparison.input.bytes), (3, 6));
        assert!(!feed.comparison.input.problems.contains_key(&Kind::Compression));
    }

    #[test]
    fn damage_is_noted_and_what_came_before_is_used() {
        let mut bytes = compressed("a\n");
        let whole = bytes.len();
        bytes.extend(compressed(&"b\n".repeat(500)));
        for cut in [whole + 2, bytes.len() - 3] {
            let feed = feed(&bytes[..cut]);
            assert!(feed.comparison.input.lines >= 1, "{cut}");
            assert!(feed.comparison.input.problems.contains_key(&Kind::Compression), "{cut}");
        }
        bytes.extend(b"garbage");
        assert!(feed(&bytes).comparison.input.problems.contains_key(&Kind::Compression));
    }
}

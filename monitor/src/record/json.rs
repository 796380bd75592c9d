//! JSON as it is written, piece by piece into one buffer, for the lines of which there are many.

use serde::Serialize;

use super::Plain;

/// An object that is being written. [`Object::close`] ends it.
#[derive(Debug)]
#[must_use = "an object has to be closed"]
pub(super) struct Object<'a> {
    to: &'a mut Vec<u8>,
    is_empty: bool,
}

impl<'a> Object<'a> {
    pub(super) fn open(to: &'a mut Vec<u8>) -> Self {
        to.push(b'{');
        Self { to, is_empty: true }
    }

    pub(super) fn close(self) {
        self.to.push(b'}');
    }

    /// Writes a key of this program, which has nothing to escape; its value is to follow.
    pub(super) fn key(&mut self, key: &'static str) -> &mut Vec<u8> {
        if !std::mem::replace(&mut self.is_empty, false) {
            self.to.push(b',');
        }
        self.to.push(b'"');
        self.to.extend_from_slice(key.as_bytes());
        self.to.extend_from_slice(b"\":");
        self.to
    }

    pub(super) fn number(&mut self, key: &'static str, value: u64) {
        number(self.key(key), value);
    }

    /// Writes several keys and values at once, or the begin of that, as they stand in the line. What is open in it has to be
    /// closed by more such text.
    pub(super) fn raw(&mut self, text: &[u8]) -> &mut Vec<u8> {
        if !std::mem::replace(&mut self.is_empty, false) {
            self.to.push(b',');
        }
        self.to.extend_from_slice(text);
        self.to
    }

    /// Text that has nothing to escape.
    pub(super) fn word(&mut self, key: &'static str, value: &str) {
        let to = self.key(key);
        to.push(b'"');
        to.extend_from_slice(value.as_bytes());
        to.push(b'"');
    }

    /// Anything else.
    pub(super) fn value(&mut self, key: &'static str, value: &(impl Serialize + ?Sized)) {
        anything(self.key(key), value);
    }

    /// As [`Object::value`], nothing for `None`.
    pub(super) fn some(&mut self, key: &'static str, value: Option<&(impl Serialize + ?Sized)>) {
        if let Some(value) = value {
            self.value(key, value);
        }
    }

    pub(super) fn object(&mut self, key: &'static str, fill: impl FnOnce(&mut Object<'_>)) {
        let mut object = Object::open(self.key(key));
        fill(&mut object);
        object.close();
    }

    /// An array of objects.
    pub(super) fn objects<T>(
        &mut self,
        key: &'static str,
        of: impl Iterator<Item = T>,
        mut fill: impl FnMut(&mut Object<'_>, T),
    ) {
        let to = self.key(key);
        to.push(b'[');
        for (i, item) in of.enumerate() {
            if i > 0 {
                to.push(b',');
            }
            let mut object = Object::open(to);
            fill(&mut object, item);
            object.close();
        }
        to.push(b']');
    }
}

/// Appends a number, two digits at a time.
pub(super) fn number(to: &mut Vec<u8>, mut value: u64) {
    const PAIRS: &[u8; 200] = b"0001020304050607080910111213141516171819\
        2021222324252627282930313233343536373839\
        4041424344454647484950515253545556575859\
        6061626364656667686970717273747576777879\
        8081828384858687888990919293949596979899";
    let mut digits = [0; 20];
    let mut at = digits.len();
    while value >= 10 {
        let pair = 2 * usize::try_from(value % 100).unwrap_or(0);
        value /= 100;
        at -= 2;
        digits[at..at + 2].copy_from_slice(&PAIRS[pair..pair + 2]);
    }
    if value > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + u8::try_from(value).unwrap_or(0);
    }
    to.extend_from_slice(&digits[at..]);
}

/// Appends a number that is finite: the shortest text that reads back as it.
pub(super) fn real(to: &mut Vec<u8>, value: f64) {
    if value.to_bits() == 0 {
        to.extend_from_slice(b"0.0"); // Most rates: of what stands still.
    } else {
        anything(to, &value);
    }
}

/// Appends whatever can be written.
pub(super) fn anything(to: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    value
        .serialize(&mut serde_json::Serializer::with_formatter(to, Plain))
        .expect("every map key is text, and a buffer takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_the_formatter_writes_them() {
        let near_powers = (0..20).flat_map(|n| {
            let power = 10_u64.pow(n);
            [power - 1, power, power + 1, power.wrapping_mul(7), power / 3]
        });
        for value in near_powers.chain([u64::MAX, u64::MAX - 1, 1 << 63]) {
            let mut text = Vec::new();
            number(&mut text, value);
            assert_eq!(String::from_utf8(text).unwrap(), value.to_string());
        }
    }

    #[test]
    fn real_numbers_are_as_serde_json_writes_them() {
        for value in [0.0, -0.0, 1.0, 0.1, 1e300, 1e-7, 123_456.789, f64::MIN_POSITIVE] {
            let mut text = Vec::new();
            real(&mut text, value);
            assert_eq!(String::from_utf8(text).unwrap(), serde_json::to_string(&value).unwrap());
        }
    }

    #[test]
    fn objects_nest_and_text_is_escaped() {
        let mut line = Vec::new();
        let mut object = Object::open(&mut line);
        object.object("a", |_| {});
        object.objects("b", 1..3, |object, n| {
            object.number("n", n);
            object.word("w", "x");
        });
        object.value("c", "\u{9b}\"\n");
        object.some("d", None::<&str>);
        object.close();
        assert_eq!(
            String::from_utf8(line).unwrap(),
            r#"{"a":{},"b":[{"n":1,"w":"x"},{"n":2,"w":"x"}],"c":"\u009b\"\n"}"#
        );
    }
}

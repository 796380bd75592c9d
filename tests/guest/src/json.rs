//! One JSON object on one line, built by hand: the guest is a small static binary without a JSON library.

use std::fmt::{Display, Write as _};

/// A JSON object under construction. Keys are ours and need no escaping; text values are escaped.
#[derive(Debug, Default)]
pub(crate) struct Object(String);

impl Object {
    /// An object without members.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a number, or any value whose `Display` is JSON already.
    pub(crate) fn raw(mut self, key: &str, value: impl Display) -> Self {
        let comma = if self.0.is_empty() { "" } else { "," };
        write!(self.0, "{comma}\"{key}\":{value}").expect("writing to a string cannot fail");
        self
    }

    /// Adds text.
    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, format_args!("\"{}\"", escape(value)))
    }
}

impl Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{{{}}}", self.0)
    }
}

/// A JSON array of objects.
pub(crate) fn array(objects: impl IntoIterator<Item = Object>) -> String {
    let items: Vec<String> = objects.into_iter().map(|object| object.to_string()).collect();
    format!("[{}]", items.join(","))
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_separated_and_text_is_escaped() {
        let object = Object::new().raw("n", 1).text("t", "a\"b\\c\n").raw("o", Object::new());
        assert_eq!(object.to_string(), r#"{"n":1,"t":"a\"b\\c\u000a","o":{}}"#);
        assert_eq!(array([Object::new().raw("a", 1), Object::new()]), r#"[{"a":1},{}]"#);
    }
}

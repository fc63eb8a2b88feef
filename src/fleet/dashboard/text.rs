//! Texts of strangers: shown and remembered, but never at any length.

/// Bytes of a name: AMQP carries no longer one.
pub(super) const NAME: usize = 255;
/// Bytes of a message.
pub(super) const MESSAGE: usize = 1000;

/// As much of a text as fits.
pub(super) fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        for (most, part) in [(0, ""), (1, "a"), (2, "a"), (3, "aé"), (9, "aéb")] {
            assert_eq!(cut("aéb", most), part, "{most}");
        }
    }
}

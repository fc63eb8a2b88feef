//! Enums whose values are words of the wire.

/// Declares such an enum. Its words are the names of its variants in snake case, for serde as for
/// `as_str`.
macro_rules! words {
    ($(#[$meta:meta])* pub enum $name:ident { $($variants:tt)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[derive(strum::IntoStaticStr, strum::VariantArray, strum::EnumMessage)]
        #[strum(serialize_all = "snake_case")]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variants)* }

        impl $name {
            /// The word on the wire.
            pub fn as_str(self) -> &'static str {
                self.into()
            }
        }
    };
}
pub(super) use words;

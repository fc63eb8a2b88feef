//! Pickles, as `torch.save` writes them.

use crate::archive::torch_zip;

/// A pickle of protocol 2, written an operation at a time.
#[derive(Default)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    /// A pickle that has its protocol and nothing else.
    pub fn new() -> Self {
        Self(vec![0x80, 2])
    }

    /// Appends operations as they are.
    pub fn op(&mut self, operations: &[u8]) {
        self.0.extend_from_slice(operations);
    }

    /// Pushes a text.
    pub fn text(&mut self, text: &str) {
        self.op(b"X");
        let length = u32::try_from(text.len()).expect("a text of a test");
        self.op(&length.to_le_bytes());
        self.op(text.as_bytes());
    }

    /// Pushes a number.
    pub fn number(&mut self, number: i64) {
        self.op(&[0x8a, 8]);
        self.op(&number.to_le_bytes());
    }

    /// A tensor of one dimension, a view of storage `key`.
    pub fn tensor(&mut self, storage: &str, key: usize, of: i64, length: i64, stride: i64) {
        self.op(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.op(format!("ctorch\n{storage}Storage\n").as_bytes());
        self.text(&key.to_string());
        self.text("cpu");
        self.number(of);
        self.op(b"tQ");
        self.number(0);
        for number in [length, stride] {
            self.number(number);
            self.op(&[0x85]);
        }
        self.op(b"\x89ccollections\nOrderedDict\n)RtR");
    }
}

/// A torch file of one chunk, whose fields but for the name are written by the caller, and of two
/// storages of eight zeros.
pub fn one_chunk(name: &str, write: impl FnOnce(&mut Pickle)) -> Vec<u8> {
    let mut pickle = Pickle::new();
    pickle.op(b"}");
    pickle.text("chunks");
    pickle.op(b"]}(");
    pickle.text("name");
    pickle.text(name);
    write(&mut pickle);
    pickle.op(b"uas.");
    torch_zip(pickle.0, vec![vec![0; 8], vec![0; 8]])
}

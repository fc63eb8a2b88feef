//! The scratch weights that the session reads, and how entries are written: on the host by a loop, on a
//! device by a small graph that scatters values from pinned memory into the weight's own buffer.

use half::{bf16, f16};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::{PrimitiveTensorElementType, Tensor};

use super::SessionError;
use super::provider::Storage;
use crate::model::onnx::{DATA, WeightSpec, copy_graph, nan_graph, scatter_graph};
use crate::model::tensor::Dtype;

/// The most bytes of coordinates that are written at once: half of the smallest buffer that a device may have.
const COORDINATES: usize = 64 << 20;

/// An element of a weight.
trait Element: PrimitiveTensorElementType + Copy + PartialEq + std::fmt::Debug + 'static {
    const DTYPE: Dtype;
    /// Converts a value that was already rounded to this type.
    fn narrow(value: f32) -> Self;
    /// Reads a whole tensor of little-endian elements.
    fn read(bytes: &[u8]) -> Vec<Self>;
    /// Whether the values equal the bytes, bit for bit.
    fn same(values: &[Self], bytes: &[u8]) -> bool;
    /// Whether it equals the narrowed value, bit for bit.
    fn is(self, value: f32) -> bool;
}

macro_rules! element {
    ($type:ty, $dtype:expr, $narrow:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = $dtype;

            fn narrow(value: f32) -> Self {
                $narrow(value)
            }

            fn read(bytes: &[u8]) -> Vec<Self> {
                let elements = bytes.as_chunks().0.iter();
                elements.map(|b| Self::from_le_bytes(*b)).collect()
            }

            fn same(values: &[Self], bytes: &[u8]) -> bool {
                let (elements, rest) = bytes.as_chunks();
                let pairs = values.iter().zip(elements);
                rest.is_empty()
                    && values.len() == elements.len()
                    && pairs.map(|(v, b)| v.to_le_bytes() == *b).all(|same| same)
            }

            fn is(self, value: f32) -> bool {
                self.to_bits() == Self::narrow(value).to_bits()
            }
        }
    };
}

element!(f32, Dtype::F32, std::convert::identity);
element!(f16, Dtype::F16, f16::from_f32);
element!(bf16, Dtype::Bf16, bf16::from_f32);

enum Values {
    F32(Tensor<f32>),
    F16(Tensor<f16>),
    Bf16(Tensor<bf16>),
}

/// Evaluates the expression for the type that the values have.
macro_rules! each {
    ($values:expr, $tensor:ident => $do:expr) => {
        match $values {
            Values::F32($tensor) => $do,
            Values::F16($tensor) => $do,
            Values::Bf16($tensor) => $do,
        }
    };
}

/// One weight as the session reads it.
pub(super) struct Scratch {
    pub(super) input: String,
    numel: usize,
    values: Values,
}

impl Scratch {
    pub(super) fn bind(&self, binding: &mut IoBinding) -> ort::Result<()> {
        each!(&self.values, tensor => binding.bind_input(&self.input, tensor))
    }
}

/// Ordinary memory.
pub(super) fn host_memory() -> ort::Result<MemoryInfo<'static>> {
    let (device, kind) = (AllocationDevice::CPU, MemoryType::Default);
    MemoryInfo::new(device, 0, AllocatorType::Device, kind)
}

/// Where the scratch weights live.
pub(super) enum Memory {
    Host,
    Device(Box<Device>),
}

impl Memory {
    /// Creates a scratch weight from bytes.
    pub(super) fn fill(&mut self, spec: WeightSpec) -> Result<Scratch, SessionError> {
        let values = match spec.dtype {
            Dtype::F32 => Values::F32(self.place(spec.shape, &spec.bytes)?),
            Dtype::F16 => Values::F16(self.place(spec.shape, &spec.bytes)?),
            Dtype::Bf16 => Values::Bf16(self.place(spec.shape, &spec.bytes)?),
        };
        Ok(Scratch {
            input: spec.input,
            numel: spec.bytes.len() / spec.dtype.size(),
            values,
        })
    }

    /// Replaces the content of a scratch weight by as many bytes.
    pub(super) fn refill(
        &mut self,
        scratch: &mut Scratch,
        bytes: &[u8],
    ) -> Result<(), SessionError> {
        each!(&mut scratch.values, tensor => {
            let shape = tensor.shape().to_vec();
            *tensor = self.place(shape, bytes)?;
        });
        Ok(())
    }

    fn place<T: Element>(
        &mut self,
        shape: Vec<i64>,
        bytes: &[u8],
    ) -> Result<Tensor<T>, SessionError> {
        let host = Tensor::from_array((shape, T::read(bytes)))?;
        Ok(match self {
            Self::Host => host,
            Self::Device(device) => device.upload(&host)?,
        })
    }

    /// Writes absolute values (already rounded to the weight's type).
    pub(super) fn write(
        &mut self,
        scratch: &mut Scratch,
        positions: &[u32],
        values: &[f32],
    ) -> Result<(), SessionError> {
        // Checked here, because an index out of range on a device would fail every later call.
        if positions.iter().any(|p| *p as usize >= scratch.numel) {
            let message = format!("a position is outside {}", scratch.input);
            return Err(SessionError::Other(message));
        }
        match self {
            Self::Host => each!(&mut scratch.values, tensor => put(tensor, positions, values)),
            Self::Device(device) => {
                each!(&mut scratch.values, tensor => device.scatter_all(tensor, positions, values))?;
            }
        }
        Ok(())
    }

    /// Whether a scratch weight holds exactly these entries.
    pub(super) fn holds(
        &mut self,
        scratch: &Scratch,
        entries: Entries<'_>,
    ) -> Result<bool, SessionError> {
        Ok(each!(&scratch.values, tensor => match self {
            Self::Host => entries.are(tensor),
            Self::Device(device) => entries.are(&device.download(tensor)?),
        }))
    }

    /// Where what a session computes from the weights stays.
    pub(super) fn info(&self) -> ort::Result<MemoryInfo<'static>> {
        match self {
            Self::Host => host_memory(),
            Self::Device(device) => Ok(device.info.clone()),
        }
    }

    /// A description for the report of `scorer check`.
    pub(super) fn describe(&self) -> &'static str {
        match self {
            Self::Host => "host memory, written in place",
            Self::Device(device) if device.in_place => "device memory, written in place",
            Self::Device(_) => "device memory, copied at each write",
        }
    }
}

fn put<T: Element>(tensor: &mut Tensor<T>, positions: &[u32], values: &[f32]) {
    let (_, slots) = tensor.extract_tensor_mut();
    for (position, value) in positions.iter().zip(values) {
        slots[*position as usize] = T::narrow(*value);
    }
}

/// What a weight may hold.
#[derive(Debug, Clone, Copy)]
pub enum Entries<'a> {
    /// Little-endian elements of the weight's type.
    Bytes(&'a [u8]),
    /// Values that are already rounded to the weight's type.
    Values(&'a [f32]),
}

impl Entries<'_> {
    fn are<T: Element>(self, tensor: &Tensor<T>) -> bool {
        let (_, found) = tensor.extract_tensor();
        match self {
            Self::Bytes(bytes) => T::same(found, bytes),
            Self::Values(values) => {
                found.len() == values.len() && found.iter().zip(values).all(|(f, v)| f.is(*v))
            }
        }
    }
}

/// Device memory, and the graphs that write it and read it back.
pub(super) struct Device {
    weights: Allocator,
    staging: Allocator,
    info: MemoryInfo<'static>,
    host: MemoryInfo<'static>,
    kernels: Vec<(Dtype, Kernels)>,
    in_place: bool,
}

struct Kernels {
    scatter: Session,
    copy: Session,
}

#[cfg(test)]
impl Storage {
    /// The CPU provider's memory, used with the same graphs and bindings.
    pub(super) fn stand_in() -> Self {
        Self {
            memory: AllocationDevice::CPU,
            staging: AllocationDevice::CPU,
        }
    }
}

impl Device {
    /// Makes the graphs that write weights of these types, finds the device's memory and tests both.
    pub(super) fn new(
        storage: &Storage,
        id: i32,
        dtypes: impl Iterator<Item = Dtype>,
        make: impl Fn(&[u8]) -> Result<Session, SessionError>,
    ) -> Result<Self, SessionError> {
        let mut kernels: Vec<(Dtype, Kernels)> = Vec::new();
        for dtype in dtypes {
            if kernels.iter().all(|(known, _)| *known != dtype) {
                let (scatter, copy) = (make(&scatter_graph(dtype))?, make(&copy_graph(dtype))?);
                kernels.push((dtype, Kernels { scatter, copy }));
            }
        }
        // A session that lives as long as what is allocated.
        let (_, Kernels { copy, .. }) = kernels.first().ok_or_else(no_kernels)?;
        let info = |device: &AllocationDevice<'static>, id, kind| {
            MemoryInfo::new(device.clone(), id, AllocatorType::Device, kind)
        };
        let own = MemoryType::Default;
        let mut device = Self {
            weights: Allocator::new(copy, info(&storage.memory, id, own)?)?,
            info: info(&storage.memory, id, own)?,
            staging: Allocator::new(copy, info(&storage.staging, id, MemoryType::CPUInput)?)?,
            host: host_memory()?,
            kernels,
            in_place: true,
        };
        device.prove_writes()?;
        Ok(device)
    }

    /// Tests whether writes happen in the weight's own buffer; if not, each write makes a copy.
    fn prove_writes(&mut self) -> Result<(), SessionError> {
        let dtypes: Vec<Dtype> = self.kernels.iter().map(|(dtype, _)| *dtype).collect();
        for dtype in dtypes {
            let mut written = self.tries(dtype);
            if self.in_place && written != Ok(true) {
                self.in_place = false;
                written = self.tries(dtype);
            }
            if !written? {
                let dtype = dtype.as_str();
                let message = format!("entries written into {dtype} weights do not arrive");
                return Err(SessionError::Other(message));
            }
        }
        Ok(())
    }

    /// Tests whether `x == x` is false for NaN on the device, in f32 and in each type of the weights: drivers
    /// may take it for true, and graphs are rewritten to rely on it.
    pub(super) fn check_nan(
        &self,
        make: impl Fn(&[u8]) -> Result<Session, SessionError>,
    ) -> Result<(), SessionError> {
        self.sees_nan::<f32>(&make)?;
        for (dtype, _) in &self.kernels {
            match dtype {
                Dtype::F32 => {}
                Dtype::F16 => self.sees_nan::<f16>(&make)?,
                Dtype::Bf16 => self.sees_nan::<bf16>(&make)?,
            }
        }
        Ok(())
    }

    fn sees_nan<T: Element>(
        &self,
        make: impl Fn(&[u8]) -> Result<Session, SessionError>,
    ) -> Result<(), SessionError> {
        let tried = [
            f32::NAN,
            1.0,
            -f32::NAN,
            f32::INFINITY,
            0.0,
            f32::NEG_INFINITY,
        ];
        let values: Vec<T> = tried.into_iter().map(T::narrow).collect();
        let mut unlike_itself = make(&nan_graph(T::DTYPE))?;
        let values = Tensor::from_array(([tried.len()], values))?;
        let outputs = unlike_itself.run(ort::inputs![DATA => values])?;
        let (_, seen) = outputs["output"].try_extract_tensor::<f32>()?;
        let seen = seen.iter().map(|seen| *seen != 0.0);
        if seen.eq(tried.iter().map(|value| value.is_nan())) {
            return Ok(());
        }
        Err(SessionError::Unavailable(format!(
            "the device's driver takes NaN for equal to itself in {}, so no score on it would be right; update the driver \
             or use another device",
            T::DTYPE.as_str()
        )))
    }

    fn tries(&mut self, dtype: Dtype) -> Result<bool, SessionError> {
        Ok(match dtype {
            Dtype::F32 => self.writes::<f32>()?,
            Dtype::F16 => self.writes::<f16>()?,
            Dtype::Bf16 => self.writes::<bf16>()?,
        })
    }

    /// Writes some entries of a small weight and checks that exactly these changed, and that the buffer
    /// stayed the same if writes are in place.
    fn writes<T: Element>(&mut self) -> ort::Result<bool> {
        let small: Vec<T> = (0_u8..12).map(|n| T::narrow(f32::from(n))).collect();
        let mut weight = self.upload(&Tensor::from_array(([3_usize, 4], small.clone()))?)?;
        let before = weight.data_ptr();
        self.scatter(&mut weight, &[1, 7, 10], &[-1.0, -2.0, -3.0])?;
        let stayed = weight.data_ptr() == before;
        let mut expected = small;
        for (position, value) in [(1, -1.0), (7, -2.0), (10, -3.0)] {
            expected[position] = T::narrow(value);
        }
        let found = self.download(&weight)?;
        let arrived = found.extract_tensor().1 == expected;
        Ok(arrived && stayed == self.in_place)
    }

    fn upload<T: Element>(&mut self, host: &Tensor<T>) -> ort::Result<Tensor<T>> {
        let mut weight = Tensor::<T>::new(&self.weights, host.shape().clone())?;
        let copy = &mut self.kernels::<T>()?.copy;
        let mut binding = copy.create_binding()?;
        binding.bind_input(DATA, host)?;
        binding.bind_output("output", &mut weight)?;
        copy.run_binding(&binding)?;
        binding.synchronize_outputs()?;
        drop(binding);
        Ok(weight)
    }

    fn download<T: Element>(&mut self, weight: &Tensor<T>) -> ort::Result<Tensor<T>> {
        let host = self.host.clone();
        let copy = &mut self.kernels::<T>()?.copy;
        let mut binding = copy.create_binding()?;
        binding.bind_input(DATA, weight)?;
        binding.bind_output_to_device("output", &host)?;
        let mut outputs = copy.run_binding(&binding)?;
        let output = outputs.remove("output");
        let output = output.ok_or_else(|| ort::Error::new("nothing was copied"))?;
        output.downcast()
    }

    /// The coordinates of an entry take several times what the entry does, so those of all would not fit into
    /// a buffer into which the weight does.
    fn scatter_all<T: Element>(
        &mut self,
        weight: &mut Tensor<T>,
        positions: &[u32],
        values: &[f32],
    ) -> ort::Result<()> {
        let coordinates = size_of::<i64>() * weight.shape().len().max(1);
        let most = (COORDINATES / coordinates).max(1);
        let mut parts = positions.chunks(most).zip(values.chunks(most));
        parts.try_for_each(|(positions, values)| self.scatter(weight, positions, values))
    }

    fn scatter<T: Element>(
        &mut self,
        weight: &mut Tensor<T>,
        positions: &[u32],
        values: &[f32],
    ) -> ort::Result<()> {
        let shape: Vec<i64> = weight.shape().iter().copied().collect();
        let (count, rank) = (positions.len(), shape.len());
        let mut indices = Tensor::<i64>::new(&self.staging, [count, rank])?;
        coordinates(positions, &shape, indices.extract_tensor_mut().1);
        let mut updates = Tensor::<T>::new(&self.staging, [count])?;
        for (slot, value) in updates.extract_tensor_mut().1.iter_mut().zip(values) {
            *slot = T::narrow(*value);
        }
        let mut fresh = match self.in_place {
            true => None,
            false => Some(Tensor::<T>::new(&self.weights, weight.shape().clone())?),
        };
        let scatter = &mut self.kernels::<T>()?.scatter;
        let mut binding = scatter.create_binding()?;
        binding.bind_input(DATA, &*weight)?;
        binding.bind_input("indices", &indices)?;
        binding.bind_input("updates", &updates)?;
        match &mut fresh {
            Some(fresh) => binding.bind_output("output", fresh)?,
            None => binding.bind_output("output", &mut *weight)?,
        }
        scatter.run_binding(&binding)?;
        binding.synchronize_outputs()?;
        drop(binding);
        if let Some(fresh) = fresh {
            *weight = fresh;
        }
        Ok(())
    }

    fn kernels<T: Element>(&mut self) -> ort::Result<&mut Kernels> {
        let mut all = self.kernels.iter_mut();
        let found = all.find_map(|(dtype, kernels)| (*dtype == T::DTYPE).then_some(kernels));
        found.ok_or_else(no_kernels)
    }
}

fn no_kernels() -> ort::Error {
    ort::Error::new("no kernels for this element type")
}

/// Row-major positions as coordinates, one row each.
fn coordinates(positions: &[u32], shape: &[i64], coordinates: &mut [i64]) {
    let rows = coordinates.chunks_exact_mut(shape.len().max(1));
    for (row, position) in rows.zip(positions) {
        let mut rest = i64::from(*position);
        for (slot, dimension) in row.iter_mut().zip(shape).rev() {
            *slot = rest % dimension;
            rest /= dimension;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_become_coordinates() {
        let mut found = [0; 6];
        coordinates(&[0, 5, 7], &[2, 4], &mut found);
        assert_eq!(found, [0, 0, 1, 1, 1, 3]);
    }

    #[test]
    fn a_device_weight_is_written_in_its_buffer_and_read_back() {
        let set = ["engine.execution_provider=cpu".to_owned()];
        let layers = crate::config::Layers {
            set: &set,
            ..crate::config::Layers::default()
        };
        let config = crate::config::Config::load(&layers).unwrap().engine;
        let make = |graph: &[u8]| super::super::kernel(&config, graph);
        let storage = Storage::stand_in();
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let mut device = Device::new(&storage, 0, dtypes.into_iter(), make).unwrap();
        assert!(device.in_place);
        for in_place in [true, false] {
            device.in_place = in_place;
            let mut memory = Memory::Device(Box::new(device));
            for dtype in dtypes {
                round_trip(&mut memory, dtype);
            }
            let Memory::Device(same) = memory else {
                unreachable!()
            };
            device = *same;
        }
    }

    fn round_trip(memory: &mut Memory, dtype: Dtype) {
        let bytes = |values: &[f32]| -> Vec<u8> {
            let bits = values.iter().map(|v| match dtype {
                Dtype::F32 => v.to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
                Dtype::Bf16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
            });
            bits.flatten().collect()
        };
        let before = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0];
        let spec = WeightSpec {
            input: "weight".into(),
            shape: vec![2, 3, 2],
            dtype,
            bytes: bytes(&before).into(),
        };
        let mut scratch = memory.fill(spec).unwrap();
        assert!(
            memory
                .holds(&scratch, Entries::Bytes(&bytes(&before)))
                .unwrap()
        );
        let mut after = before;
        (after[0], after[4], after[11]) = (-8.0, -0.25, 0.0);
        memory
            .write(&mut scratch, &[0, 4, 11], &[-8.0, -0.25, 0.0])
            .unwrap();
        assert!(
            memory
                .holds(&scratch, Entries::Bytes(&bytes(&after)))
                .unwrap()
        );
        assert!(memory.holds(&scratch, Entries::Values(&after)).unwrap());
        assert!(!memory.holds(&scratch, Entries::Values(&before)).unwrap());
        assert!(
            !memory
                .holds(&scratch, Entries::Values(&after[..11]))
                .unwrap()
        );
        assert!(
            !memory
                .holds(&scratch, Entries::Bytes(&bytes(&before)))
                .unwrap()
        );
        assert!(memory.write(&mut scratch, &[12], &[1.0]).is_err());
        memory
            .write(&mut scratch, &[0, 4, 11], &[0.5, 2.5, 6.0])
            .unwrap();
        assert!(
            memory
                .holds(&scratch, Entries::Bytes(&bytes(&before)))
                .unwrap()
        );
    }
}

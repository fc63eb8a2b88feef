//! The provider `webgpu` on the GPU in software that `ops/setup device` brings, and what holds for any.

use half::f16;

use super::build::{GraphSource, build_by};
use super::provider::{Storage, row};
use super::scratch::Device;
use super::*;
use crate::config::{Config, Layers, Provider};
use crate::model::onnx::hand_made::{self, Made, Place, Runnable};
use crate::model::onnx::{copy_graph, scatter_graph};
use crate::model::tensor::Dtype;

fn config(set: &[&str]) -> EngineConfig {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    let layers = Layers {
        set: &set,
        ..Layers::default()
    };
    Config::load(&layers).unwrap().engine
}

fn webgpu() -> EngineConfig {
    config(&["engine.execution_provider=webgpu"])
}

fn spec(input: &str, dtype: Dtype, bytes: Vec<u8>) -> WeightSpec {
    WeightSpec {
        input: input.into(),
        shape: vec![i64::try_from(bytes.len() / dtype.size()).unwrap()],
        dtype,
        bytes: bytes.into(),
    }
}

#[test]
fn weights_live_on_the_device_and_are_written_in_place() {
    let _turn = row(Provider::WebGpu).turn();
    let ones = [1_f32; 6].map(f32::to_le_bytes).concat();
    let halves = [f16::ONE; 6].map(f16::to_le_bytes).concat();
    let specs = || {
        [
            spec("wide", Dtype::F32, ones.clone()),
            spec("half", Dtype::F16, halves.clone()),
        ]
    };
    let mut memory = memory(&webgpu(), &specs()).unwrap();
    assert_eq!(memory.describe(), "device memory, written in place");
    assert!(vulkan::runs_on_llvmpipe());
    for (before, bytes) in specs().into_iter().zip([&ones, &halves]) {
        let mut weight = memory.fill(before).unwrap();
        memory.write(&mut weight, &[0, 5], &[-0.5, 2.0]).unwrap();
        let changed = [-0.5, 1.0, 1.0, 1.0, 1.0, 2.0];
        let holds = memory.holds(&weight, Entries::Values(&changed));
        assert!(holds.unwrap(), "{}", weight.input);
        memory.write(&mut weight, &[0, 5], &[1.0, 1.0]).unwrap();
        assert!(memory.holds(&weight, Entries::Bytes(bytes)).unwrap());
    }
}

#[test]
fn a_session_that_silently_is_on_the_cpu_is_refused() {
    let (cpu, graph) = (row(Provider::Cpu), copy_graph(Dtype::F32));
    for provider in [Provider::WebGpu, Provider::Cuda] {
        let name = row(provider).name();
        for weights in [vec![DATA.to_owned()], Vec::new()] {
            let source = GraphSource::Bytes(&graph);
            let terminator = Terminator::default();
            let terms = Terms::new(&weights, &terminator);
            let made = build_by(cpu.register, name, &config(&[]), source, terms);
            let error = made.unwrap_err();
            let SessionError::Unavailable(message) = error else {
                panic!("{error:?}");
            };
            assert!(message.contains(name), "{message}");
            assert!(message.contains("identity (Identity)"), "{message}");
        }
    }
}

/// Where the nodes of this graph are on the device, its input `x` being the weight.
fn placed(nodes: &[Made<'_>]) -> Result<Placement, SessionError> {
    let graph = Runnable {
        opset: 20,
        place: Place::Graph,
        half: false,
        shape: &[None],
        nodes,
    };
    let graph = graph.encode();
    let (weights, terminator) = (["x".to_owned()], Terminator::default());
    let terms = Terms::new(&weights, &terminator);
    let built = build(&webgpu(), GraphSource::Bytes(&graph), terms);
    built.map(|(_, placement)| placement)
}

fn made<'a>(name: &'a str, op: &'a str, input: &'a [&'a str], output: &'a str) -> Made<'a> {
    Made {
        name,
        op,
        input,
        output,
        ..Made::default()
    }
}

#[test]
fn arithmetic_on_shapes_may_stay_on_the_host_and_computing_with_weights_may_not() {
    let shape = made("shape", "Shape", &["x"], "s");
    let zeros = made("zeros", "ConstantOfShape", &["s"], "z");
    let add = made("add", "Add", &["x", "z"], "y");
    let placement = placed(&[shape, zeros, add]).unwrap();
    assert!(placement.device > 0);
    assert_eq!(placement.host_in_words(), "zeros (ConstantOfShape)");
    let guard = made("guard", "IsNaN", &["x"], "n");
    let choice = made("choice", "Where", &["n", "x", "x"], "y");
    let error = placed(&[guard, choice]).unwrap_err();
    let SessionError::Unavailable(message) = error else {
        panic!("{error:?}");
    };
    assert!(message.contains("guard (IsNaN)"), "{message}");
}

#[test]
fn tensors_that_the_device_would_lose_are_refused_by_name() {
    let row = row(Provider::WebGpu);
    let most = usize::try_from(vulkan::largest_buffer()).unwrap();
    let fits = hand_made::holding("table", most / 4);
    let bf16 = row.accepts(&[spec("embed", Dtype::Bf16, vec![0; 2])], &fits);
    assert_eq!(bf16, Err(SessionError::NoKernel("embed is bf16".into())));
    let weight = |bytes| [spec("head", Dtype::F32, vec![0; bytes])];
    row.accepts(&weight(most), &fits).unwrap();
    let large = hand_made::holding("table", most / 4 + 1);
    for (refused, name) in [
        (row.accepts(&weight(most + 4), &fits), "head"),
        (row.accepts(&weight(4), &large), "table"),
    ] {
        let error = refused.unwrap_err().to_string();
        let start = format!("{name} has {} bytes", most + 4);
        assert!(error.starts_with(&start), "{error}");
    }
}

/// Whether entries that are written at both ends of a weight of so many bytes arrive, and nothing else changes.
fn arrive(bytes: usize) -> bool {
    let _turn = row(Provider::WebGpu).turn();
    let weight = || spec("large", Dtype::F32, vec![0; bytes]);
    let mut memory = memory(&webgpu(), &[weight()]).unwrap();
    let mut weight = memory.fill(weight()).unwrap();
    assert!(
        memory
            .holds(&weight, Entries::Bytes(&vec![0; bytes]))
            .unwrap()
    );
    let mut values = vec![0.0; bytes / 4];
    let last = values.len() - 1;
    (values[0], values[last]) = (1.0, 2.0);
    let ends = [0, u32::try_from(last).unwrap()];
    memory.write(&mut weight, &ends, &[1.0, 2.0]).unwrap();
    memory.holds(&weight, Entries::Values(&values)).unwrap()
}

/// Their coordinates take more than the device's largest buffer long before the weight does.
#[test]
fn all_entries_of_a_weight_that_fits_are_written() {
    let _turn = row(Provider::WebGpu).turn();
    let entries = usize::try_from(vulkan::largest_buffer()).unwrap() / 8 + 1;
    let weight = || spec("large", Dtype::F16, vec![0; 2 * entries]);
    let mut memory = memory(&webgpu(), &[weight()]).unwrap();
    let mut weight = memory.fill(weight()).unwrap();
    let positions: Vec<u32> = (0..u32::try_from(entries).unwrap()).collect();
    let values = vec![1.0; entries];
    memory.write(&mut weight, &positions, &values).unwrap();
    assert!(memory.holds(&weight, Entries::Values(&values)).unwrap());
}

/// The limit is where the device begins to lose entries. No session gets there; if one did, the probe of
/// the warm-up, which reads back what it wrote, would see it.
#[test]
fn beyond_the_limit_the_device_drops_entries_without_an_error() {
    let most = usize::try_from(vulkan::largest_buffer()).unwrap();
    assert!(arrive(most));
    assert!(!arrive(most + 4));
    let source = Source {
        graph: Graph::decode(copy_graph(Dtype::F32).into()).unwrap(),
        folder: PathBuf::new(),
        made: None,
    };
    let large = spec(DATA, Dtype::F32, vec![0; most + 4]);
    let error = Session::new(&webgpu(), source, &[], vec![large], 1).unwrap_err();
    assert!(error.to_string().starts_with("data has "), "{error}");
}

#[test]
fn a_request_beyond_all_memory_is_out_of_memory() {
    let failure = crate::engine::exhaust(&webgpu()).unwrap();
    assert_eq!(
        failure.code,
        crate::protocol::failure::Code::OutOfMemory,
        "{failure}"
    );
}

#[test]
fn a_device_that_does_not_see_nan_is_refused() {
    let cpu = config(&["engine.execution_provider=cpu"]);
    let make = |graph: &[u8]| kernel(&cpu, graph);
    let device = Device::new(&Storage::stand_in(), 0, [Dtype::F16].into_iter(), make).unwrap();
    device.check_nan(make).unwrap();
    let blind = |_: &[u8]| kernel(&cpu, &copy_graph(Dtype::F32));
    let error = device.check_nan(blind).unwrap_err();
    assert!(matches!(error, SessionError::Unavailable(_)), "{error:?}");
}

#[test]
fn errors_of_a_device_are_told_apart() {
    let told = |text: &str| SessionError::from(ort::Error::new(text));
    let validation = "WebGPU validation failed. [Invalid Buffer (unlabeled)] is invalid";
    for text in [
        validation,
        "narrowing_error",
        "CUDA failure 2: out of memory",
    ] {
        assert!(matches!(told(text), SessionError::OutOfMemory(_)), "{text}");
    }
    for text in [
        "[Device] is lost.",
        "MapAsyncStatus value: 4",
        "CUDA failure 700",
    ] {
        assert!(matches!(told(text), SessionError::Lost(_)), "{text}");
    }
    let text = "Failed to get a WebGPU adapter: none";
    assert!(matches!(told(text), SessionError::Unavailable(_)));
    assert!(matches!(told("a bug"), SessionError::Other(_)));
}

#[test]
fn the_plugin_is_where_it_may_be_or_is_named_as_missing() {
    let set = "engine.webgpu_plugin=/nowhere/libonnxruntime_providers_webgpu.so";
    let config = config(&["engine.execution_provider=webgpu", set]);
    let error = kernel(&config, &scatter_graph(Dtype::F32)).unwrap_err();
    let SessionError::Unavailable(message) = error else {
        panic!("{error:?}");
    };
    for part in ["engine.webgpu_plugin", "/nowhere", "onnxruntime-ep-webgpu"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(plugin(&config), None);
    let found = plugin(&webgpu()).unwrap();
    assert!(found.path.is_absolute() && found.sha256.len() == 64);
}

#[test]
fn a_compilation_ends_on_demand() {
    let graph = copy_graph(Dtype::F32);
    let cpu = config(&["engine.execution_provider=cpu"]);
    let terminator = Terminator::default();
    let late: provider::Register = |_, builder| {
        let cancelled = builder.canceler().cancel();
        cancelled.map(|()| builder).map_err(SessionError::from)
    };
    let (source, terms) = (GraphSource::Bytes(&graph), Terms::new(&[], &terminator));
    let made = build_by(late, "CPUExecutionProvider", &cpu, source, terms);
    assert_eq!(made.map(|_| ()), Err(SessionError::Terminated));
    // None begins after the end.
    terminator.terminate();
    let made = build(&cpu, source, terms);
    assert_eq!(made.map(|_| ()), Err(SessionError::Terminated));
}

//! Where shared libraries lie that nobody names: beside the binary, where `ops/setup` puts ONNX Runtime for a binary that
//! cargo built, and where pip installs those of ONNX Runtime and NVIDIA. Never in the working directory, for a library
//! runs as the worker.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

/// Where the Python package `onnxruntime` keeps its library, from the folder of all packages.
const RUNTIME: &str = "onnxruntime/capi";

/// The folders in which cargo leaves a binary. Beside them is that of ONNX Runtime, for `ops/setup` and `ops/demo`. No
/// folder of another name has one beside it: whoever may write there need not be who built the binary.
const BUILT: [&str; 2] = ["target/debug", "target/release"];
const BESIDE_BUILT: &str = "onnxruntime";

/// The file name of the plugin of the provider `webgpu`.
pub(super) const WEBGPU: &str = "libonnxruntime_providers_webgpu.so";

/// What the CUDA provider needs, in NVIDIA's Python packages, each after those that it needs itself. The names are
/// those of `ops/onnxruntime-gpu.txt`.
const CUDA: [&str; 8] = [
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libnvJitLink.so.13",
    "nvidia/cu13/lib/libnvrtc.so.13",
    "nvidia/cu13/lib/libcublasLt.so.13",
    "nvidia/cu13/lib/libcublas.so.13",
    "nvidia/cu13/lib/libcurand.so.10",
    "nvidia/cu13/lib/libcufft.so.12",
    "nvidia/cudnn/lib/libcudnn.so.9",
];

/// ONNX Runtime for a binary in this folder: beside it, else where `ops/setup` put it if cargo built the binary there,
/// else in the Python package of the environment (a virtual one, the user's, the system's) whose programs the folder
/// holds. The error says where it was looked for.
pub(super) fn runtime(bin: &Path) -> Result<PathBuf, String> {
    let packages = packages(bin).into_iter().map(|all| all.join(RUNTIME));
    let mut folders = std::iter::once(bin.to_owned())
        .chain(fetched(bin))
        .chain(packages);
    folders
        .find_map(|folder| library_in(&folder))
        .ok_or_else(|| {
            let prefix = bin.parent().unwrap_or(bin).display();
            let fetched = fetched(bin).map(|folder| format!(", in {}", folder.display()));
            format!(
                "no libonnxruntime.so in {}{} and in {prefix}/lib*/python3*/*-packages/{RUNTIME}",
                bin.display(),
                fetched.unwrap_or_default(),
            )
        })
}

/// Where `ops/setup` puts ONNX Runtime for a binary in this folder, if cargo built it there.
fn fetched(bin: &Path) -> Option<PathBuf> {
    let built = BUILT.iter().any(|folder| bin.ends_with(folder));
    let target = bin.parent().filter(|_| built)?;
    Some(target.join(BESIDE_BUILT))
}

/// Where the plugin of WebGPU may be if ONNX Runtime is in this folder.
pub(super) fn webgpu(runtime: &Path) -> impl Iterator<Item = PathBuf> {
    let package = packages_around(runtime).map(|all| all.join("onnxruntime_ep_webgpu"));
    let folders = std::iter::once(runtime.to_owned()).chain(package);
    folders.map(|folder| folder.join(WEBGPU))
}

/// NVIDIA's libraries in the Python packages around that of ONNX Runtime, which is in this folder.
pub(super) fn cuda(runtime: &Path) -> Vec<PathBuf> {
    let all = packages_around(runtime).into_iter();
    let paths = all.flat_map(|all| CUDA.map(|name| all.join(name)));
    paths.filter(|path| path.is_file()).collect()
}

/// The folder of all Python packages, if this is that of ONNX Runtime's. Only then it is known that whoever may
/// write two folders above may be trusted as much.
fn packages_around(runtime: &Path) -> Option<&Path> {
    let is_package = runtime.ends_with(RUNTIME);
    runtime.ancestors().nth(2).filter(|_| is_package)
}

/// The latest by name, should there be several.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let found = entries(folder, "libonnxruntime.so");
    found.into_iter().max().map(|name| folder.join(name))
}

/// The folders of Python packages of the environment that this folder of programs belongs to, the latest Python's
/// first. Debian calls them dist-packages, Fedora keeps some in lib64.
fn packages(bin: &Path) -> Vec<PathBuf> {
    let prefix = bin.parent().unwrap_or(bin);
    let pythons = ["lib", "lib64"].map(|lib| prefix.join(lib)).map(|lib| {
        let mut names = entries(&lib, "python3");
        names.sort_by_key(|name| Reverse(minor(name)));
        names.into_iter().map(move |name| lib.join(name))
    });
    let each = |python: PathBuf| ["site-packages", "dist-packages"].map(|name| python.join(name));
    pythons.into_iter().flatten().flat_map(each).collect()
}

/// 11 of `python3.11`; none of Debian's `python3`.
fn minor(name: &str) -> Option<u32> {
    name.strip_prefix("python3.")?.parse().ok()
}

/// The names in a folder that begin so; none if there is no such folder.
fn entries(folder: &Path, begins: &str) -> Vec<String> {
    let all = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = all.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(begins)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files, empty ones.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        root
    }

    fn found(files: &[&str]) -> Result<String, String> {
        found_from("bin", files)
    }

    /// What a binary in this folder finds, from where the files are.
    fn found_from(bin: &str, files: &[&str]) -> Result<String, String> {
        let root = tree(files);
        let path = runtime(&root.path().join(bin))?;
        let inside = path.strip_prefix(root.path()).unwrap();
        Ok(inside.display().to_string())
    }

    #[test]
    fn the_library_is_found_where_each_installer_puts_it() {
        let capi = "onnxruntime/capi/libonnxruntime.so.1.31.1";
        for packages in [
            "lib/python3.11/site-packages",
            "lib64/python3.13/site-packages",
            "lib/python3/dist-packages",
            "lib/python3.11/dist-packages",
        ] {
            let file = format!("{packages}/{capi}");
            assert_eq!(found(&["bin/scorer", &file]), Ok(file));
        }
    }

    #[test]
    fn what_lies_beside_the_binary_comes_first_and_the_latest_python_next() {
        let old = "lib/python3.9/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1";
        let new = "lib/python3.12/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1";
        assert_eq!(found(&[old, new]), Ok(new.into()));
        let beside = "bin/libonnxruntime.so";
        assert_eq!(found(&[old, new, beside]), Ok(beside.into()));
    }

    #[test]
    fn a_binary_that_cargo_built_finds_what_the_setup_fetched_and_no_other_one_does() {
        let (file, plugin) = (
            "clone/target/onnxruntime/libonnxruntime.so.1.31.1",
            "clone/target/onnxruntime/libonnxruntime_providers_webgpu.so",
        );
        for built in ["clone/target/debug", "clone/target/release"] {
            assert_eq!(found_from(built, &[file, plugin]), Ok(file.into()));
            let beside = format!("{built}/libonnxruntime.so");
            assert_eq!(found_from(built, &[file, &beside]), Ok(beside));
        }
        // Others may write beside these, or the working directory may be there.
        for other in [
            "clone",
            "clone/target",
            "clone/target/debug/deps",
            "clone/target/bin",
            "clone/debug",
            "debug",
        ] {
            let planted = [
                file,
                "onnxruntime/libonnxruntime.so",
                "clone/onnxruntime/libonnxruntime.so",
                "target/onnxruntime/libonnxruntime.so",
            ];
            assert!(found_from(other, &planted).is_err(), "{other}");
        }
        let why = found_from("clone/target/debug", &[]).unwrap_err();
        assert!(why.contains("clone/target/onnxruntime and in "), "{why}");
    }

    #[test]
    fn a_refusal_says_where_it_was_looked_for() {
        let root = tree(&["bin/scorer", "lib/python3.11/site-packages/numpy/core.so"]);
        let bin = root.path().join("bin");
        let why = runtime(&bin).unwrap_err();
        assert!(why.contains(&bin.display().to_string()), "{why}");
        let packages = root
            .path()
            .join("lib*/python3*/*-packages/onnxruntime/capi");
        assert!(why.contains(&packages.display().to_string()), "{why}");
    }

    #[test]
    fn the_libraries_of_cuda_come_from_the_same_environment_in_the_order_of_their_needs() {
        let root = tree(&[
            "site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1",
            "site-packages/nvidia/cudnn/lib/libcudnn.so.9",
            "site-packages/nvidia/cu13/lib/libcublas.so.13",
            "site-packages/nvidia/cu13/lib/libcublasLt.so.13",
            "elsewhere/libonnxruntime.so",
        ]);
        let packages = root.path().join("site-packages");
        let runtime = packages.join("onnxruntime/capi");
        let wanted = [
            "cu13/lib/libcublasLt.so.13",
            "cu13/lib/libcublas.so.13",
            "cudnn/lib/libcudnn.so.9",
        ];
        let wanted = wanted.map(|name| packages.join("nvidia").join(name));
        assert_eq!(cuda(&runtime), wanted);
        assert!(cuda(&root.path().join("elsewhere")).is_empty());
    }

    #[test]
    fn only_a_python_package_of_onnx_runtime_has_the_plugin_s_package_beside_it() {
        let found = |runtime: &str| -> Vec<String> {
            let places = webgpu(Path::new(runtime));
            let folder = |place: PathBuf| place.parent().unwrap().display().to_string();
            places.map(folder).collect()
        };
        let packages = "/venv/site-packages";
        assert_eq!(
            found("/venv/site-packages/onnxruntime/capi"),
            [
                format!("{packages}/onnxruntime/capi"),
                format!("{packages}/onnxruntime_ep_webgpu")
            ]
        );
        // Two folders up may be the working directory, or open to everybody.
        assert_eq!(
            found("/home/target/onnxruntime"),
            ["/home/target/onnxruntime"]
        );
        assert_eq!(found("/"), ["/"]);
    }
}

//! Names that a library changes when it saves a model, of tensors whose contents say nothing: zero
//! biases, norms of ones. What is known of their neighbours tells where they are: if everything of
//! `encoder.layer.0` is in `layers.0`, then so is `encoder.layer.0.norm.weight`.

use std::collections::{BTreeMap, BTreeSet};

use super::place::is_parameter;
use crate::model::checkpoint::Tensor;
use crate::model::compare::{Initializer, agrees, is_uniform};
use crate::model::onnx::Wiring;
use crate::model::tensor::Dtype;

/// A tensor of the checkpoint and the parameter of the graph that it certainly is.
type Known<'a> = (&'a str, &'a str);

/// The parameters of the graph that tensors of one value are under other names; those that nothing
/// shows are left out.
pub(super) fn saved_names<'a>(
    tensors: &[Tensor],
    pool: impl Iterator<Item = &'a Initializer>,
    wiring: &Wiring,
) -> BTreeMap<String, String> {
    let parameters = pool.filter(|(info, _)| is_parameter(&info.name));
    let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let (named, free): (Vec<_>, Vec<_>) =
        parameters.partition(|(info, _)| names.contains(info.name.as_str()));
    let held: BTreeSet<&str> = named.iter().map(|(info, _)| info.name.as_str()).collect();
    let unknown = tensors.iter().filter(|t| !held.contains(t.name.as_str()));
    let (uniform, varied): (Vec<&Tensor>, Vec<&Tensor>) = unknown.partition(|t| is_uniform(t));
    if uniform.is_empty() || free.is_empty() {
        return BTreeMap::new();
    }
    let mut known: Vec<Known<'_>> = held.iter().map(|name| (*name, *name)).collect();
    for tensor in varied {
        let mut same = free.iter().filter(|held| holds(held, tensor));
        if let (Some((info, _)), None) = (same.next(), same.next()) {
            known.push((&tensor.name, &info.name));
        }
    }
    let called = |name: &str| {
        let mut nodes = wiring.nodes.iter();
        nodes.any(|node| node.passes(name) == Some(true))
    };
    let lost: Vec<&Tensor> = uniform.into_iter().filter(|t| !called(&t.name)).collect();
    let taken: BTreeSet<&str> = known.iter().map(|(_, parameter)| *parameter).collect();
    let free: Vec<&Initializer> = free
        .into_iter()
        .filter(|(info, _)| !taken.contains(info.name.as_str()))
        .collect();
    let found = lost.iter().filter_map(|tensor| {
        let name = by_neighbours(tensor, &known, &free).or_else(|| left_over(tensor, &lost, &free));
        Some((tensor.name.clone(), name?))
    });
    once(found.collect())
}

/// The parameter of the same rest of the name in the part of the graph that holds the tensor's
/// neighbours and nothing else; so must all parts within it, in which layers may have other numbers.
fn by_neighbours(tensor: &Tensor, known: &[Known<'_>], free: &[&Initializer]) -> Option<String> {
    let ends = tensor.name.match_indices('.').map(|(at, _)| at + 1);
    let ends: Vec<usize> = ends.collect();
    ends.iter().rev().find_map(|end| {
        let (part, rest) = tensor.name.split_at(*end);
        let inside = known.iter().filter(|(name, _)| name.starts_with(part));
        let held = common_part(inside.map(|(_, parameter)| *parameter))?;
        let wanted = format!("{held}{rest}");
        let mut free = free.iter();
        let there = free.any(|held| held.0.name == wanted && holds(held, tensor));
        let within = rest.match_indices('.').map(|(at, _)| at + 1);
        let mut parts = std::iter::once(0)
            .chain(within)
            .map(|at| (&tensor.name[..end + at], &wanted[..held.len() + at]));
        (there && parts.all(|(ours, theirs)| is_same_part(known, ours, theirs))).then_some(wanted)
    })
}

/// Whether everything known of one part of the checkpoint is in the other part of the graph, and
/// nothing else.
fn is_same_part(known: &[Known<'_>], ours: &str, theirs: &str) -> bool {
    let mut known = known.iter();
    known.all(|(name, parameter)| name.starts_with(ours) == parameter.starts_with(theirs))
}

/// The only parameter within the tensor's module that may be it, if the tensor is the only one that
/// may be this parameter: a decoder's bias that is saved as the head's.
fn left_over(tensor: &Tensor, lost: &[&Tensor], free: &[&Initializer]) -> Option<String> {
    let fits = |tensor: &Tensor, held: &Initializer| {
        let (module, last) = tensor.name.rsplit_once('.').unwrap_or(("", &tensor.name));
        let inner = held.0.name.strip_prefix(module);
        let inner = inner.and_then(|inner| inner.strip_suffix(last));
        inner.is_some_and(|i| i.starts_with('.') && i.ends_with('.')) && holds(held, tensor)
    };
    let mut fitting = free.iter().filter(|held| fits(tensor, held));
    let (only, None) = (fitting.next()?, fitting.next()) else {
        return None;
    };
    let rivals = lost.iter().filter(|other| fits(other, only)).count();
    (rivals == 1).then(|| only.0.name.clone())
}

/// Whether the initializer holds the tensor as it is.
fn holds(held: &Initializer, tensor: &Tensor) -> bool {
    held.0.shape == tensor.shape && agrees(tensor, held, Dtype::F32).is_some()
}

/// The longest common beginning of whole parts.
fn common_part<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let part = |name: &'a str| name.rsplit_once('.').map_or("", |(module, _)| module);
    let mut parts = names.into_iter().map(|name| part(name).split('.'));
    let first: Vec<&str> = parts.next()?.collect();
    let common = parts.fold(first, |common, other| {
        let pairs = common.into_iter().zip(other);
        pairs.take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
    });
    (!common.is_empty()).then(|| format!("{}.", common.join(".")))
}

/// Without parameters that two tensors would be.
fn once(found: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut claims: BTreeMap<String, usize> = BTreeMap::new();
    for parameter in found.values() {
        *claims.entry(parameter.clone()).or_default() += 1;
    }
    let single = found.into_iter();
    single
        .filter(|(_, parameter)| claims[parameter] == 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::onnx::InitializerInfo;
    use crate::model::onnx::hand_made::{Made, graph, tensor};

    const ONES: [f32; 2] = [1.0; 2];
    const A: [f32; 2] = [1.0, 2.0];
    const B: [f32; 2] = [3.0, 4.0];

    fn found(
        checkpoint: &[(&str, [f32; 2])],
        graph_holds: &[(&str, [f32; 2])],
        call: &str,
    ) -> Vec<(String, String)> {
        let tensors: Vec<Tensor> = checkpoint.iter().map(|(n, v)| tensor(n, v)).collect();
        let held = |(name, values): &(&str, [f32; 2])| {
            let info = InitializerInfo {
                name: (*name).to_owned(),
                shape: vec![2],
                dtype: Some(Dtype::F32),
            };
            (info, tensor(name, values).bytes)
        };
        let pool: Vec<Initializer> = graph_holds.iter().map(held).collect();
        let node = Made {
            name: "n",
            op: "Add",
            input: &["x"],
            output: "y",
            call,
            ..Made::default()
        };
        let wiring = graph(&[node], &[]).wiring().unwrap();
        saved_names(&tensors, pool.iter(), &wiring)
            .into_iter()
            .collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn a_layer_that_is_saved_under_another_name_takes_its_norms_along() {
        let saved = [
            ("m.encoder.layer.0.query.weight", A),
            ("m.encoder.layer.0.query.bias", ONES),
            ("m.encoder.layer.0.norm.weight", ONES),
            ("m.encoder.layer.1.query.weight", B),
            ("m.encoder.layer.1.norm.weight", ONES),
        ];
        let mut live = [
            ("m.layers.0.attention.q.weight", A),
            ("m.layers.0.attention.q.bias", ONES),
            ("m.layers.0.norm.weight", ONES),
            ("m.layers.1.attention.q.weight", B),
            ("m.layers.1.norm.weight", ONES),
        ];
        let all = [
            ("m.encoder.layer.0.norm.weight", "m.layers.0.norm.weight"),
            (
                "m.encoder.layer.0.query.bias",
                "m.layers.0.attention.q.bias",
            ),
            ("m.encoder.layer.1.norm.weight", "m.layers.1.norm.weight"),
        ];
        assert_eq!(found(&saved, &live, ""), pairs(&all));
        // A tensor that the graph calls by its name is merged, not renamed.
        let call = "%add : add(args = (%x, %p_m_encoder_layer_0_query_bias))";
        assert_eq!(found(&saved, &live, call), pairs(&[all[0], all[2]]));
        // What the graph holds there has other values.
        live[2].1 = [0.0; 2];
        assert_eq!(found(&saved, &live, ""), pairs(&all[1..]));
    }

    #[test]
    fn layers_that_have_other_numbers_in_the_graph_are_not_told_by_number() {
        let saved = [
            ("m.encoder.layer.0.query.weight", A),
            ("m.encoder.layer.0.norm.weight", ONES),
            ("m.encoder.layer.1.query.weight", B),
            ("m.encoder.layer.1.norm.weight", ONES),
        ];
        let live = [
            ("m.layers.0.query.weight", B),
            ("m.layers.0.norm.weight", ONES),
            ("m.layers.1.query.weight", A),
            ("m.layers.1.norm.weight", ONES),
        ];
        assert_eq!(found(&saved, &live, ""), []);
    }

    #[test]
    fn a_bias_within_the_module_is_it_only_if_both_are_alone() {
        let saved = [("m.head.bias", ONES), ("m.head.up.weight", A)];
        let live = [
            ("m.head.decoder.bias", ONES),
            ("m.head.up.weight", A),
            ("m.other.bias", ONES),
        ];
        let expected = pairs(&[("m.head.bias", "m.head.decoder.bias")]);
        assert_eq!(found(&saved, &live, ""), expected);
        let two = [&live[..], &[("m.head.inner.bias", ONES)]].concat();
        assert_eq!(found(&saved, &two, ""), []);
        let rivals = [&saved[..], &[("m.bias", ONES)]].concat();
        let one = [live[0], live[1]];
        assert_eq!(found(&rivals, &one, ""), []);
    }
}

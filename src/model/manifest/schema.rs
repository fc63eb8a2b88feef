//! Rules of the manifest that its JSON schema states beside the types.

use schemars::Schema;
use serde_json::{Value, json};

use crate::protocol::schema::{given, says};

/// What `check_objective` checks of inputs and outputs.
pub(super) fn names_of_the_objective(schema: &mut Schema) {
    let part = |part: &str, rule: Value| json!({ "properties": { part: rule } });
    let absent = |name: &str| json!({ "not": given(name) });
    let rules = json!([
        {
            "if": part("objective", says("kind", "causal_lm")),
            "then": { "allOf": [
                part("inputs", given("tokens")),
                part("outputs", given("logits")),
                part("outputs", absent("loss")),
            ] },
            "else": { "allOf": [
                part("inputs", absent("tokens")),
                part("inputs", absent("attention_mask")),
                part("inputs", absent("position_ids")),
                part("outputs", absent("logits")),
                part("outputs", given("loss")),
            ] },
        },
    ]);
    schema.insert("allOf".into(), rules);
}

/// What `check` checks of a tensor's shape.
pub(super) fn only_matrices_are_transposed(schema: &mut Schema) {
    let transposed =
        json!({ "required": ["transposed"], "properties": { "transposed": { "const": true } } });
    let some =
        json!({ "required": ["places"], "properties": { "places": { "contains": transposed } } });
    let matrix = json!({
        "required": ["shape"],
        "properties": { "shape": { "minItems": 2, "maxItems": 2 } },
    });
    schema.insert("if".into(), some);
    schema.insert("then".into(), matrix);
}

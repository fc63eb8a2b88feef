//! The JSON Schemas of every message, generated from the types that decode them.

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

/// The schema of a type, draft 2020-12.
pub fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12()
        .with_transform(RecursiveTransform(bound_integer))
        .with_transform(RecursiveTransform(allow_null))
        .into_generator()
        .into_root_schema_for::<T>()
}

/// The type that holds an integer bounds it; by itself a validator knows no end.
fn bound_integer(schema: &mut Schema) {
    let bounds = match schema.get("format").and_then(Value::as_str) {
        Some("uint" | "uint64") => Some((json!(0), json!(u64::MAX))),
        Some("uint32") => Some((json!(0), json!(u32::MAX))),
        Some("int64") => Some((json!(i64::MIN), json!(i64::MAX))),
        Some(_) | None => None,
    };
    if let Some((least, most)) = bounds {
        for (name, bound) in [("minimum", least), ("maximum", most)] {
            if schema.get(name).is_none() {
                schema.insert(name.into(), bound);
            }
        }
    }
}

/// Null is as good as leaving a field out, wherever that may be.
fn allow_null(schema: &mut Schema) {
    let required = schema.get("required").and_then(Value::as_array).cloned();
    let required = required.unwrap_or_default();
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else {
        return;
    };
    let optional = properties
        .iter_mut()
        .filter(|(name, _)| !required.iter().any(|r| r == name.as_str()));
    for (_, property) in optional {
        if let Value::Object(property) = property
            && !takes_null(property)
        {
            add_null(property);
        }
    }
}

fn takes_null(schema: &Map<String, Value>) -> bool {
    match (schema.get("type"), schema.get("anyOf")) {
        (Some(Value::Array(types)), _) => types.iter().any(|t| t == "null"),
        (Some(one), _) => one == "null",
        (None, Some(Value::Array(any))) => any.iter().filter_map(Value::as_object).any(takes_null),
        (None, _) => !["$ref", "const", "enum", "oneOf", "allOf"]
            .iter()
            .any(|bound| schema.contains_key(*bound)),
    }
}

fn add_null(schema: &mut Map<String, Value>) {
    let remarks = ["description", "default"];
    let plain = !["const", "enum", "oneOf", "allOf", "anyOf"]
        .iter()
        .any(|bound| schema.contains_key(*bound));
    match schema.get_mut("type") {
        Some(one @ Value::String(_)) if plain => *one = json!([one.take(), "null"]),
        Some(_) | None => {
            let (kept, moved) = std::mem::take(schema)
                .into_iter()
                .partition(|(name, _)| remarks.contains(&name.as_str()));
            *schema = kept;
            let moved: Map<String, Value> = moved;
            schema.insert("anyOf".into(), json!([moved, { "type": "null" }]));
        }
    }
}

/// That a field is there, and not null.
pub(crate) fn given(name: &str) -> Value {
    json!({ "required": [name], "properties": { name: { "not": { "type": "null" } } } })
}

/// That a field is there with this value.
pub(crate) fn says(name: &str, value: &str) -> Value {
    json!({ "required": [name], "properties": { name: { "const": value } } })
}

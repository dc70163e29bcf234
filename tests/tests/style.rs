//! Limits of the sources: they mark where to look for a missing idea.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of code of a file, before its unit tests.
const FILE: usize = 500;
const FUNCTION: usize = 80;
const PARAMETERS: usize = 6;
const VARIANTS: usize = 12;

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("directory").flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for part in ["proto", "vmm", "guest-agent", "sandbox", "image", "shim", "cli", "benches", "tests", "fuzz"]
    {
        sources(&root.join(part), &mut found);
    }
    assert!(found.len() > 50, "sources were not found");
    found.into_iter().map(|path| (path.clone(), fs::read_to_string(path).expect("source"))).collect()
}

/// The file before its unit tests.
fn product(source: &str) -> &str {
    source.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(source)
}

fn is_code(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with("//")
}

/// Functions as (name, parameters, code lines): from the line of `fn` to the closing brace at its indentation.
fn functions(source: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<_> = source.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let bare = line.trim_start();
        let Some((prefix, rest)) = bare.split_once("fn ") else { continue };
        if !prefix.split_whitespace().all(|word| {
            ["pub", "const", "async", "unsafe", "extern", "\"C\""].contains(&word) || word.starts_with("pub(")
        }) {
            continue;
        }
        let indentation = line.len() - bare.len();
        let end = lines[start..].iter().position(|line| {
            line.len() - line.trim_start().len() == indentation && line.trim_start().starts_with('}')
                || line.trim_end().ends_with("; }")
        });
        let Some(end) = end else { continue };
        let head = lines[start..=start + end].join("\n");
        let name = rest.split(['(', '<']).next().unwrap_or_default().to_string();
        let code = lines[start..=start + end].iter().filter(|line| is_code(line)).count();
        found.push((name, parameters(&head), code));
    }
    found
}

/// Commas at the top level of the first parenthesis, `self` not counted.
fn parameters(head: &str) -> usize {
    let Some(open) = head.find('(') else { return 0 };
    let (mut depth, mut names) = (0_i32, Vec::new());
    let mut current = String::new();
    for character in head[open..].chars() {
        match character {
            '(' | '<' | '[' => depth += 1,
            ')' | '>' | ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if character == ',' && depth == 1 {
            names.push(std::mem::take(&mut current));
        } else {
            current.push(character);
        }
    }
    names.push(current);
    names.iter().filter(|name| name.contains(':')).count()
}

#[test]
fn files_and_functions_stay_small() {
    let mut over = Vec::new();
    for (path, source) in all() {
        let path = path.display();
        let is_test = path.to_string().contains("/tests/");
        let product = product(&source);
        let lines = product.lines().filter(|line| is_code(line)).count();
        if lines > FILE {
            over.push(format!("{path}: {lines} lines of code, at most {FILE}"));
        }
        for (name, parameters, lines) in functions(product) {
            if lines > FUNCTION && !is_test {
                over.push(format!("{path}: {name} has {lines} lines, at most {FUNCTION}"));
            }
            if parameters > PARAMETERS {
                over.push(format!("{path}: {name} has {parameters} parameters, at most {PARAMETERS}"));
            }
        }
    }
    assert!(over.is_empty(), "\n{}", over.join("\n"));
}

#[test]
fn error_enums_stay_small() {
    let mut over = Vec::new();
    for (path, source) in all() {
        for part in product(&source).split("thiserror::Error").skip(1) {
            let Some((_, body)) = part.split_once("enum ").filter(|(before, _)| before.lines().count() <= 2)
            else {
                continue;
            };
            let body = body.split("\n}").next().unwrap_or_default();
            let variants = body.matches("#[error(").count();
            if variants > VARIANTS {
                over.push(format!("{}: {variants} variants, at most {VARIANTS}", path.display()));
            }
        }
    }
    assert!(over.is_empty(), "\n{}", over.join("\n"));
}

#[test]
fn runtime_class_is_what_its_script_writes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let written =
        std::process::Command::new(root.join("scripts/runtimeclass")).output().expect("scripts/runtimeclass");
    assert!(written.status.success(), "{written:?}");
    let shipped = fs::read_to_string(root.join("dist/runtimeclass.yaml")).expect("dist/runtimeclass.yaml");
    assert_eq!(
        String::from_utf8_lossy(&written.stdout),
        shipped,
        "scripts/runtimeclass >dist/runtimeclass.yaml"
    );
}

#[test]
fn unsafe_is_where_it_may_be() {
    let allowed = ["vmm/src/sys.rs", "vmm/src/kvm/", "guest-agent/src/sys/", "sandbox/src/sys.rs"];
    let mut elsewhere = Vec::new();
    for (path, source) in all() {
        let path = path.to_string_lossy().replace(concat!(env!("CARGO_MANIFEST_DIR"), "/../"), "");
        let is_unsafe = product(&source).lines().any(|line| is_code(line) && line.contains("unsafe {"));
        if is_unsafe && !allowed.iter().any(|place| path.starts_with(place)) && !path.starts_with("tests/") {
            elsewhere.push(path);
        }
    }
    assert!(elsewhere.is_empty(), "unsafe outside the modules for it: {elsewhere:?}");
}

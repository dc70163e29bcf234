//! `krx doctor`: the findings about this host, for people or as JSON.

use krx_sandbox::preflight::{self, Finding, Level, installation};

/// No pod can run here.
const UNFIT: u8 = 1;

pub(crate) fn run(json: bool) -> u8 {
    let mut findings = preflight::check_host();
    findings.extend(installation::check());
    let fit = findings.iter().all(|finding| finding.level != Level::Error);
    if json {
        println!("{}", serde_json::json!({ "ok": fit, "checks": findings }));
    } else {
        print!("{}", text(&findings));
    }
    if fit { 0 } else { UNFIT }
}

fn text(findings: &[Finding]) -> String {
    let mut lines = String::new();
    for Finding { check, level, what, meaning, remedy } in findings {
        let level = match level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Error => "ERROR",
        };
        lines.push_str(&format!("{level:<8} {check:<14} {what}\n"));
        if level != "ok" {
            lines.push_str(&format!("{:<24}this means: {meaning}\n", ""));
            if !remedy.is_empty() {
                lines.push_str(&format!("{:<24}what to do: {remedy}\n", ""));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_stand_below_what_is_wrong() {
        let wrong = Finding {
            check: "kvm",
            level: Level::Error,
            what: "gone".into(),
            meaning: "no pods",
            remedy: "load it",
        };
        let fine = Finding { level: Level::Ok, ..wrong.clone() };
        let text = text(&[wrong, fine]);
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains("ERROR") && text.contains("what to do: load it"));
    }
}

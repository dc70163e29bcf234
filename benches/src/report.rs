//! Figures with their spread, as a table for people and as JSON with the revision.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// All figures of one run of a benchmark.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub bench: String,
    /// Of the sources, `-dirty` behind it when they were changed.
    pub revision: String,
    /// `cms` (counted milliseconds) or `ms`.
    pub unit: String,
    pub rows: Vec<Row>,
}

/// One figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub unit: String,
    pub samples: Vec<f64>,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// The median may not be above this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f64>,
    /// VM exits by reason, most frequent first where printed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, u64>,
}

impl Row {
    /// # Panics
    /// Without samples.
    #[must_use]
    pub fn new(name: impl Into<String>, unit: &str, samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { panic!("a row needs samples") };
        let (min, max) = (*min, *max);
        Self {
            name: name.into(),
            unit: unit.into(),
            samples,
            median: sorted[sorted.len() / 2],
            min,
            max,
            budget: None,
            parts: BTreeMap::new(),
        }
    }

    #[must_use]
    pub fn budget(mut self, budget: f64) -> Self {
        self.budget = Some(budget);
        self
    }

    #[must_use]
    pub fn parts(mut self, parts: BTreeMap<String, u64>) -> Self {
        self.parts = parts;
        self
    }

    fn is_over(&self) -> bool {
        self.budget.is_some_and(|budget| self.median > budget)
    }
}

impl Report {
    #[must_use]
    pub fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
        let mut table =
            format!("{:width$}  {:>9}  {:>9}  {:>9}  {:>7}\n", "", "median", "min", "max", "budget");
        for row in &self.rows {
            let budget = row.budget.map_or_else(String::new, |budget| format!("{budget}"));
            let verdict = if row.is_over() { "  over budget" } else { "" };
            // Writing to a string cannot fail.
            let _ = writeln!(
                table,
                "{:width$}  {:>9}  {:>9}  {:>9}  {budget:>7}  {}{verdict}",
                row.name,
                figure(row.median),
                figure(row.min),
                figure(row.max),
                row.unit,
            );
            if !row.parts.is_empty() {
                let mut parts: Vec<_> = row.parts.iter().collect();
                parts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
                let parts: Vec<_> =
                    parts.into_iter().map(|(reason, count)| format!("{reason} {count}")).collect();
                let _ = writeln!(table, "    {}", parts.join(", "));
            }
        }
        table
    }

    /// Names of the rows whose median is above its budget.
    #[must_use]
    pub fn over_budget(&self) -> Vec<&str> {
        self.rows.iter().filter(|row| row.is_over()).map(|row| row.name.as_str()).collect()
    }
}

/// Rows of the same name side by side: how B's median differs from A's.
#[must_use]
pub fn compare(a: &Report, b: &Report) -> String {
    let width = a.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
    let mut table = format!("A is {}, B is {}\n", a.revision, b.revision);
    let _ = writeln!(table, "{:width$}  {:>9}  {:>9}  {:>8}", "", "A", "B", "B - A");
    for row in &a.rows {
        let Some(other) = b.rows.iter().find(|other| other.name == row.name && other.unit == row.unit) else {
            let _ = writeln!(table, "{:width$}  {:>9}  not in B", row.name, figure(row.median));
            continue;
        };
        let percent = if row.median == 0.0 { 0.0 } else { (other.median - row.median) / row.median * 100.0 };
        // Two ranges that overlap may be one and the same figure.
        let overlaps = row.min <= other.max && other.min <= row.max;
        let note = if overlaps && percent != 0.0 { "  within the spread" } else { "" };
        let _ = writeln!(
            table,
            "{:width$}  {:>9}  {:>9}  {percent:>+7.1}%  {}{note}",
            row.name,
            figure(row.median),
            figure(other.median),
            row.unit,
        );
    }
    for row in b.rows.iter().filter(|row| a.rows.iter().all(|other| other.name != row.name)) {
        let _ = writeln!(table, "{:width$}  {:>9}  {:>9}  only in B", row.name, "", figure(row.median));
    }
    table
}

fn figure(value: f64) -> String {
    if value.fract() == 0.0 && value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(revision: &str, median: f64) -> Report {
        let rows = vec![Row::new("PID 1", "cms", vec![median + 1.0, median, median - 1.0]).budget(80.0)];
        Report { bench: "boot".into(), revision: revision.into(), unit: "cms".into(), rows }
    }

    #[test]
    fn median_and_spread_are_of_the_samples() {
        let row = Row::new("x", "cms", vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((row.median, row.min, row.max), (3.0, 1.0, 5.0));
    }

    #[test]
    fn budgets_are_judged_by_the_median() {
        assert_eq!(report("a", 80.0).over_budget(), [""; 0]);
        assert_eq!(report("a", 80.5).over_budget(), ["PID 1"]);
        assert!(report("a", 80.5).table().contains("over budget"));
    }

    #[test]
    fn comparison_tells_difference_from_spread() {
        let (a, b) = (report("a", 50.0), report("b", 60.0));
        assert!(compare(&a, &b).contains("+20.0%"), "{}", compare(&a, &b));
        assert!(compare(&a, &report("c", 51.0)).contains("within the spread"));
    }
}

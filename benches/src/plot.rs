//! Phases of starts as bars, in SVG 1.1.

use std::fmt::Write as _;

use crate::report::Row;

/// Pixels.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 150.0;
const BAR: f64 = 34.0;
const LANE: f64 = 74.0;
/// A letter of the labels, on average.
const LETTER: f64 = 6.2;
const COLOURS: [&str; 6] = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2"];

/// One start: what it is, and when each of its phases had been reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Lane {
    pub title: String,
    pub reached: Vec<(String, f64)>,
}

impl Lane {
    /// Of all rows whose names begin so, in their order; the rest of a name says the phase.
    #[must_use]
    pub fn of(rows: &[Row], title: &str, unit: &str, prefix: &str) -> Self {
        let reached = rows.iter().filter(|row| row.unit == unit);
        let reached =
            reached.filter_map(|row| Some((row.name.strip_prefix(prefix)?.to_string(), row.median)));
        Self { title: title.into(), reached: reached.collect() }
    }
}

/// A bar for each start, on one scale.
#[must_use]
pub fn svg(lanes: &[Lane], unit: &str) -> String {
    let ends = lanes.iter().filter_map(|lane| lane.reached.last()).map(|(_, end)| *end);
    let scale = (WIDTH - LEFT - 80.0) / ends.fold(1.0, f64::max);
    let mut drawing = String::new();
    let mut top = 10.0;
    for lane in lanes {
        draw(&mut drawing, lane, (top, scale), unit);
        top += LANE;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{top}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{drawing}</svg>\n"
    )
}

fn draw(drawing: &mut String, lane: &Lane, (top, scale): (f64, f64), unit: &str) {
    let middle = top + BAR / 2.0 + 4.0;
    let _ = writeln!(drawing, "<text x=\"8\" y=\"{middle}\">{}</text>", escaped(&lane.title));
    let mut from = 0.0;
    for ((label, until), colour) in lane.reached.iter().zip(COLOURS.iter().cycle()) {
        let (x, width) = (LEFT + from * scale, (until - from).max(0.0) * scale);
        let label = escaped(label);
        let _ = writeln!(
            drawing,
            "<rect x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"><title>{label}: {from:.1} to \
             {until:.1} {unit}</title></rect>"
        );
        if width > LETTER * 4.0 {
            let (x, below) = (x + 2.0, top + BAR + 14.0);
            let _ = writeln!(
                drawing,
                "<text x=\"{x:.1}\" y=\"{middle}\" fill=\"white\">{:.1}</text>",
                until - from
            );
            // What does not fit is in the title.
            let fits = label.chars().scan(0.0, |used, letter| {
                *used += LETTER;
                (*used < width).then_some(letter)
            });
            let fits: String = fits.collect();
            let _ = writeln!(drawing, "<text x=\"{x:.1}\" y=\"{below}\" font-size=\"11\">{fits}</text>");
        }
        from = *until;
    }
    let x = LEFT + from * scale + 6.0;
    let _ = writeln!(drawing, "<text x=\"{x:.1}\" y=\"{middle}\">{from:.1} {unit}</text>");
}

fn escaped(text: &str) -> String {
    text.replace('&', "and").replace(['<', '>'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_bars_one_behind_the_other() {
        let rows = [
            Row::new("vm: to a", "ms", vec![2.0]),
            Row::new("vm: exits", "exits", vec![9.0]),
            Row::new("vm: to <b>", "ms", vec![5.0]),
            Row::new("other: to a", "ms", vec![7.0]),
        ];
        let lane = Lane::of(&rows, "a VM", "ms", "vm: to ");
        assert_eq!(lane.reached, [("a".to_string(), 2.0), ("<b>".to_string(), 5.0)]);
        let drawn = svg(&[lane, Lane { title: "nothing".into(), reached: Vec::new() }], "ms");
        assert_eq!(drawn.matches("<rect x=").count(), 2);
        assert!(
            drawn.contains("<title>b: 2.0 to 5.0 ms</title>") && drawn.contains(">5.0 ms</text>"),
            "{drawn}"
        );
    }
}

//! Small panels of lines, as SVG.

use std::fmt::Write;

/// Panels of one kind side by side.
pub struct Plot {
    pub title: &'static str,
    /// Names of the places on each panel's x axis.
    pub ticks: Vec<String>,
    pub scale: Scale,
    pub panels: Vec<Panel>,
}

pub enum Scale {
    /// Values below the least, zero above all, stand on the bottom line.
    Log { least: f64, most: f64 },
    /// From 0 to each panel's largest value.
    Linear,
}

pub struct Panel {
    pub title: String,
    pub series: Vec<Series>,
}

#[derive(Clone)]
pub struct Series {
    pub system: &'static str,
    pub colour: &'static str,
    pub dashed: bool,
    /// One for each tick.
    pub points: Vec<Option<f64>>,
}

pub fn draw(plot: &Plot) -> String {
    let columns = plot.panels.len().clamp(1, COLUMNS);
    let rows = plot.panels.len().div_ceil(columns).max(1);
    let (width, height) = (columns as f64 * PANEL_W + 10.0, rows as f64 * PANEL_H + HEAD);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"10\" \
         fill=\"#222\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"13\">{}</text>\n",
        plot.title
    );
    let mut x = 10.0;
    let mut named: Vec<&str> = Vec::new();
    for series in plot.panels.iter().flat_map(|panel| &panel.series) {
        if !named.contains(&series.system) {
            named.push(series.system);
            let _ = writeln!(
                svg,
                "<line x1=\"{x}\" y1=\"32\" x2=\"{}\" y2=\"32\" stroke=\"{}\" stroke-width=\"2\"/>\
                 <text x=\"{}\" y=\"36\">{}</text>",
                x + 18.0,
                series.colour,
                x + 23.0,
                series.system
            );
            x += 90.0;
        }
    }
    for (index, panel) in plot.panels.iter().enumerate() {
        let x = (index % columns) as f64 * PANEL_W + 10.0;
        let y = (index / columns) as f64 * PANEL_H + HEAD;
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">");
        draw_panel(&mut svg, plot, panel);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_panel(svg: &mut String, plot: &Plot, panel: &Panel) {
    let (left, top, w, h) = (34.0, 18.0, PANEL_W - 50.0, PANEL_H - 48.0);
    let values = panel.series.iter().flat_map(|series| series.points.iter().flatten());
    let highest = values.fold(0.0_f64, |a, b| a.max(*b)).max(1e-9);
    let (marks, share): (Vec<f64>, Box<dyn Fn(f64) -> f64>) = match plot.scale {
        Scale::Log { least, most } => {
            let decades = (most / least).log10();
            let marks = (0..=decades.round() as i32).map(|i| least * 10_f64.powi(i)).collect();
            (marks, Box::new(move |v: f64| (v.max(least) / least).log10() / decades))
        }
        Scale::Linear => {
            let step = nice_step(highest);
            let most = (highest / step).ceil() * step;
            let marks = (0..=(most / step).round() as i32).map(|i| f64::from(i) * step).collect();
            (marks, Box::new(move |v: f64| v / most))
        }
    };
    let place = |tick: usize| left + w * (tick as f64 + 0.5) / plot.ticks.len().max(1) as f64;
    let level = |value: f64| top + h * (1.0 - share(value).clamp(0.0, 1.0));
    let _ = writeln!(svg, "<text x=\"{left}\" y=\"11\">{}</text>", escaped(&panel.title));
    for (index, mark) in marks.iter().enumerate() {
        let (y, right) = (level(*mark), left + w);
        let name = match (&plot.scale, index) {
            (Scale::Log { .. }, 0) => "0".into(),
            _ => format!("{mark}").chars().take(5).collect::<String>(),
        };
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            left - 4.0,
            y + 3.0,
        );
    }
    for (tick, name) in plot.ticks.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            place(tick),
            top + h + 13.0
        );
    }
    for series in &panel.series {
        let points: Vec<_> = (0..)
            .zip(&series.points)
            .filter_map(|(tick, value)| Some((place(tick), level((*value)?))))
            .collect();
        let line: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let dash = if series.dashed { " stroke-dasharray=\"4 3\"" } else { "" };
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"{dash}/>",
            line.join(" "),
            series.colour
        );
        for (x, y) in points {
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\" fill=\"{}\"/>",
                series.colour
            );
        }
    }
}

/// 1, 2 or 5 times a power of ten, so that three to six steps reach `highest`.
fn nice_step(highest: f64) -> f64 {
    let power = 10_f64.powf((highest / 3.0).log10().floor());
    let step = [5.0, 2.0, 1.0].into_iter().map(|factor| factor * power);
    step.filter(|step| highest / step >= 2.5).fold(power, f64::max)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

const COLUMNS: usize = 4;
const PANEL_W: f64 = 260.0;
const PANEL_H: f64 = 190.0;
/// Room for title and legend.
const HEAD: f64 = 50.0;

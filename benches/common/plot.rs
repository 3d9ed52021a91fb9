//! Line charts in SVG: small panels side by side.

use std::fmt::Write;

/// Panels with the same x axis and kind of scale.
pub struct Plot {
    pub title: &'static str,
    /// Labels of the x axis.
    pub ticks: Vec<String>,
    pub scale: Scale,
    pub panels: Vec<Panel>,
}

pub enum Scale {
    /// Values below `least`, such as 0, are drawn on the bottom line.
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
    /// One value per tick; `None` draws no point.
    pub points: Vec<Option<f64>>,
}

/// Draws `plot` as an SVG document.
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
    draw_legend(&mut svg, plot);
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

/// Draws one entry per system, with the colour of its first series.
fn draw_legend(svg: &mut String, plot: &Plot) {
    let mut x = 10.0;
    let mut drawn: Vec<&str> = Vec::new();
    for series in plot.panels.iter().flat_map(|panel| &panel.series) {
        if !drawn.contains(&series.system) {
            drawn.push(series.system);
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
}

fn draw_panel(svg: &mut String, plot: &Plot, panel: &Panel) {
    let axes = Axes::of(plot, panel);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"11\">{}</text>", escaped(&panel.title));
    draw_grid(svg, plot, &axes);
    for series in &panel.series {
        draw_series(svg, series, &axes);
    }
}

/// Draws the horizontal lines and the labels of both axes.
fn draw_grid(svg: &mut String, plot: &Plot, axes: &Axes) {
    for (index, mark) in axes.marks.iter().enumerate() {
        let (y, right) = (axes.y(*mark), LEFT + INNER_W);
        let name = match (&plot.scale, index) {
            (Scale::Log { .. }, 0) => "0".into(),
            _ => format!("{mark}").chars().take(5).collect::<String>(),
        };
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            LEFT - 4.0,
            y + 3.0,
        );
    }
    for (tick, name) in plot.ticks.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            axes.x(tick),
            TOP + INNER_H + 13.0
        );
    }
}

fn draw_series(svg: &mut String, series: &Series, axes: &Axes) {
    let points: Vec<_> = (0..)
        .zip(&series.points)
        .filter_map(|(tick, value)| Some((axes.x(tick), axes.y((*value)?))))
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

/// The mapping of ticks and values to coordinates within a panel.
struct Axes {
    ticks: usize,
    /// Labelled values of the y axis.
    marks: Vec<f64>,
    /// Maps a value to its height, from 0 at the bottom to 1 at the top.
    height: Box<dyn Fn(f64) -> f64>,
}

impl Axes {
    fn of(plot: &Plot, panel: &Panel) -> Self {
        let (marks, height): (Vec<f64>, Box<dyn Fn(f64) -> f64>) = match plot.scale {
            Scale::Log { least, most } => {
                let decades = (most / least).log10();
                let marks = (0..=decades.round() as i32).map(|i| least * 10_f64.powi(i)).collect();
                (marks, Box::new(move |v: f64| (v.max(least) / least).log10() / decades))
            }
            Scale::Linear => {
                let values = panel.series.iter().flat_map(|series| series.points.iter().flatten());
                let highest = values.fold(0.0_f64, |a, b| a.max(*b)).max(1e-9);
                let step = nice_step(highest);
                let most = (highest / step).ceil() * step;
                let count = (most / step).round() as i32;
                let marks = (0..=count).map(|i| f64::from(i) * step).collect();
                (marks, Box::new(move |v: f64| v / most))
            }
        };
        Self { ticks: plot.ticks.len().max(1), marks, height }
    }

    fn x(&self, tick: usize) -> f64 {
        LEFT + INNER_W * (tick as f64 + 0.5) / self.ticks as f64
    }

    fn y(&self, value: f64) -> f64 {
        TOP + INNER_H * (1.0 - (self.height)(value).clamp(0.0, 1.0))
    }
}

/// Returns 1, 2 or 5 times a power of ten, so that three to six steps reach `highest`.
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
/// Height of the title and the legend.
const HEAD: f64 = 50.0;
/// The drawing area within a panel.
const LEFT: f64 = 34.0;
const TOP: f64 = 18.0;
const INNER_W: f64 = PANEL_W - 50.0;
const INNER_H: f64 = PANEL_H - 48.0;

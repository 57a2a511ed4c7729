//! The figures as SVG.

use std::collections::BTreeMap;

use plotters::{coord::Shift, prelude::*};

use super::{
    Part,
    figures::Figures,
    plan::{ORDERS, WORKLOADS},
    run::Run,
};

const SIZE: (u32, u32) = (800, 420);
pub(super) const FONT: &str = "sans-serif";
/// Colours that also differ in lightness.
pub(super) const COLOURS: [RGBColor; 4] =
    [RGBColor(31, 60, 110), RGBColor(70, 130, 180), RGBColor(230, 120, 40), RGBColor(190, 190, 190)];

/// A plot.
pub(super) struct Plot {
    pub(super) title: &'static str,
    pub(super) file: &'static str,
    pub(super) svg: String,
}

/// A value of a bar chart, with the smallest and the largest value of its runs.
pub(super) struct Bar {
    median: f64,
    least: f64,
    most: f64,
}

impl Bar {
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, m), v| (l.min(*v), m.max(*v)));
        Some(Self { median: crate::bench::figures::median(values.iter().copied())?, least, most })
    }
}

/// Bars in groups. A bar that was not measured leaves its place empty.
pub(super) struct Bars<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    pub(super) groups: Vec<&'a str>,
    /// The names of the bars of each group.
    pub(super) names: Vec<&'a str>,
    /// The values, by group and then by name.
    pub(super) values: Vec<Vec<Option<Bar>>>,
    pub(super) log: bool,
    /// The decimal places of values. Values on a logarithmic axis have none.
    pub(super) decimals: usize,
    pub(super) size: (u32, u32),
}

pub(super) fn text<E: std::fmt::Display>(error: E) -> String {
    format!("plot: {error}")
}

impl Bars<'_> {
    fn all(&self) -> impl Iterator<Item = (usize, usize, &Bar)> {
        let groups = self.values.iter().enumerate();
        groups.flat_map(|(g, bars)| bars.iter().enumerate().filter_map(move |(n, bar)| Some((g, n, bar.as_ref()?))))
    }

    pub(super) fn svg(&self) -> Result<String, String> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
            area.fill(&WHITE).map_err(text)?;
            let most = self.all().map(|(_, _, bar)| bar.most).fold(0.1f64.powi(self.decimals as i32), f64::max);
            // a logarithmic axis begins at 1, and a value of 0 has a bar without height
            let scale = |value: f64| if self.log { value.max(1.0).log10() } else { value };
            // the factor leaves room for the legend above the bars
            self.draw(&area, scale(most) * 1.35, scale)?;
            area.present().map_err(text)?;
        }
        Ok(svg)
    }

    fn draw(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        top: f64,
        scale: impl Fn(f64) -> f64,
    ) -> Result<(), String> {
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 18))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..self.groups.len() as f64, 0.0..top)
            .map_err(text)?;
        let label =
            |y: &f64| if self.log { format!("{:.0}", 10f64.powf(*y)) } else { format!("{y:.*}", self.decimals) };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_desc(self.unit)
            .y_labels(if self.log { top.ceil() as usize + 1 } else { 6 })
            .y_label_formatter(&label)
            .label_style((FONT, 13))
            .draw()
            .map_err(text)?;
        let width = 0.8 / self.names.len() as f64;
        let left = |group: usize, name: usize| group as f64 + 0.1 + name as f64 * width;
        for (n, name) in self.names.iter().enumerate() {
            let style = COLOURS[n % COLOURS.len()].filled();
            let own = self.all().filter(|(_, bar, _)| *bar == n);
            let bars = own.map(|(g, n, bar)| {
                Rectangle::new([(left(g, n) + 0.01, 0.0), (left(g, n) + width - 0.01, scale(bar.median))], style)
            });
            chart
                .draw_series(bars)
                .map_err(text)?
                .label(*name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], style));
        }
        let spans = self.all().map(|(g, n, bar)| {
            let x = left(g, n) + width / 2.0;
            PathElement::new(vec![(x, scale(bar.least)), (x, scale(bar.most))], BLACK.stroke_width(1))
        });
        chart.draw_series(spans).map_err(text)?;
        let values = self.all().map(|(g, n, bar)| {
            let at = (left(g, n) + width * 0.2, scale(bar.most) + top * 0.035);
            Text::new(format!("{:.*}", self.decimals, bar.median), at, (FONT, 11))
        });
        chart.draw_series(values).map_err(text)?;
        for (g, group) in self.groups.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(g as f64 + 0.35, 0.0));
            area.draw(&Text::new(*group, (x, y + 10), (FONT, 14))).map_err(text)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .label_font((FONT, 13))
            .draw()
            .map_err(text)
    }
}

/// Draws the network faults by order and workload.
fn faults(figures: &Figures) -> Result<String, String> {
    let network = |r: &Run| r.number("/faults/network");
    let bars = |guest| ORDERS.map(|order| Bar::of(&figures.values(Part::Faults, guest, order, network))).into();
    Bars {
        title: "Network faults by push order, 1 Gbit/s",
        unit: "network faults (logarithmic)",
        groups: WORKLOADS.map(|w| w.name).into(),
        names: ORDERS.into(),
        values: WORKLOADS.map(|w| bars(w.name)).into(),
        log: true,
        decimals: 0,
        size: SIZE,
    }
    .svg()
}

/// Draws the bytes with and without a balloon.
fn balloon(figures: &Figures) -> Result<String, String> {
    let bytes = |r: &Run| Some(r.number("/wire_bytes")? / 1e6);
    let groups = ["pre-copy", "post-copy"];
    let bars = |guest| ["off", "on"].map(|b| Bar::of(&figures.values(Part::Balloon, guest, b, bytes))).into();
    Bars {
        title: "Bytes moved with and without self-ballooning, 1 Gbit/s",
        unit: "MB",
        groups: groups.into(),
        names: vec!["balloon off", "balloon on"],
        values: groups.map(bars).into(),
        log: false,
        decimals: 0,
        size: SIZE,
    }
    .svg()
}

/// Returns for each time the average number of accesses in a run of a kind that took longer.
fn slower(figures: &Figures, kind: &str) -> Vec<(f64, f64)> {
    let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
    for run in figures.of(Part::Storm, "storm", kind) {
        for (us, count) in &run.distribution {
            *counts.entry((us * 10.0) as u64).or_default() += count;
        }
    }
    let runs = figures.of(Part::Storm, "storm", kind).count();
    let mut left: u64 = counts.values().sum();
    let mut points = Vec::new();
    for (tenths, count) in counts {
        left -= count;
        if left > 0 {
            points.push((tenths as f64 / 10.0, left as f64 / runs as f64));
        }
    }
    points
}

/// Draws the times of the guest's accesses in a storm.
fn storm(figures: &Figures) -> Result<String, String> {
    let lines = [("migrates, 1 Gbit/s", "migrates", COLOURS[2]), ("stays where it is", "stays", COLOURS[0])];
    let most =
        lines.iter().flat_map(|(_, kind, _)| slower(figures, kind)).map(|point| point.1).fold(10.0, f64::max) * 2.0;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let mut chart = ChartBuilder::on(&area)
            .caption("Storm: how many accesses of a run took longer than …", (FONT, 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d((20.0..100_000.0f64).log_scale(), (0.3..most).log_scale())
            .map_err(text)?;
        chart
            .configure_mesh()
            .x_desc("µs, by the guest's clock")
            .y_desc("accesses")
            .label_style((FONT, 13))
            .light_line_style(WHITE)
            .draw()
            .map_err(text)?;
        for (name, kind, colour) in lines {
            let line = LineSeries::new(slower(figures, kind), colour.stroke_width(2));
            let legend = move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2));
            chart.draw_series(line).map_err(text)?.label(name).legend(legend);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .label_font((FONT, 13))
            .draw()
            .map_err(text)?;
        area.present().map_err(text)?;
    }
    Ok(svg)
}

/// Returns the plots of all parts that were measured.
pub(super) fn all(figures: &Figures) -> Result<Vec<Plot>, String> {
    let has = |part| figures.runs.iter().any(|r| r.step.part == part);
    let mut plots = Vec::new();
    if has(Part::Faults) {
        let title = "Network faults by push order and workload";
        plots.push(Plot { title, file: "post-copy-faults.svg", svg: faults(figures)? });
    }
    if has(Part::Storm) {
        let title = "How long the guest's accesses took in a storm";
        plots.push(Plot { title, file: "post-copy-storm.svg", svg: storm(figures)? });
    }
    if has(Part::Balloon) {
        let title = "Bytes moved with and without self-ballooning";
        plots.push(Plot { title, file: "post-copy-balloon.svg", svg: balloon(figures)? });
    }
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::{super::figures::test_util, *};

    #[test]
    fn plots_render() {
        let figures = test_util::figures(2, |step| if step.kind == "linear" { 1000 } else { 0 });
        let plots = all(&figures).unwrap();
        assert_eq!(plots.len(), 3);
        for plot in &plots {
            assert!(plot.svg.starts_with("<svg") && plot.svg.trim_end().ends_with("</svg>"), "{}", plot.file);
            assert!(!plot.svg.contains("NaN") && !plot.svg.contains("inf"), "{}", plot.file);
        }
        assert!(plots[0].svg.contains("multi-pivot") && plots[0].svg.contains("quicksort"));
        assert!(all(&Figures::new(figures.machine, 1)).unwrap().is_empty());
    }

    #[test]
    fn fewer_and_fewer_are_slower() {
        let figures = test_util::figures(2, |_| 1);
        assert_eq!(slower(&figures, "migrates"), [(32.0, 30.0), (64.0, 1.0)]);
        assert!(slower(&figures, "flies").is_empty());
    }
}

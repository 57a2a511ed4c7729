//! Timelines of a guest's speed as SVG, one below the other, with the same axes.

use plotters::{coord::Shift, prelude::*};

use super::{
    plot::{COLOURS, FONT, text},
    timeline::Timeline,
};

const WIDTH: u32 = 800;
const HEIGHT: u32 = 240;
/// The milliseconds that are shown before the request, and after the end of the longest operation.
const MARGINS: [f64; 2] = [200.0, 400.0];
/// The upper end of the speed axis in percent.
const TOP: f64 = 130.0;

/// Draws all timelines into one image.
pub(super) fn svg(timelines: &[Timeline]) -> Result<String, String> {
    let mut svg = String::new();
    {
        let size = (WIDTH, HEIGHT * timelines.len().max(1) as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let end = timelines.iter().map(|t| t.took_ms).fold(0.0, f64::max) + MARGINS[1];
        for (timeline, place) in timelines.iter().zip(area.split_evenly((timelines.len().max(1), 1))) {
            draw(timeline, &place, end)?;
        }
        area.present().map_err(text)?;
    }
    Ok(svg)
}

fn draw(timeline: &Timeline, area: &DrawingArea<SVGBackend<'_>, Shift>, end: f64) -> Result<(), String> {
    let caption = format!(
        "{}: {:.0} ms (shaded), the guest's longest gap {:.2} ms",
        timeline.name, timeline.took_ms, timeline.gap_ms
    );
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 16))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(-MARGINS[0]..end, 0.0..TOP)
        .map_err(text)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("ms since the request")
        .y_desc("speed, % of before")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .y_labels(7)
        .label_style((FONT, 12))
        .draw()
        .map_err(text)?;
    let shade = Rectangle::new([(0.0, 0.0), (timeline.took_ms, TOP)], COLOURS[3].mix(0.4).filled());
    chart.draw_series([shade]).map_err(text)?;
    let seen = timeline.points.iter().filter(|(at, _)| (-MARGINS[0]..=end).contains(at));
    let points = seen.map(|(at, speed)| (*at, speed.min(TOP)));
    chart.draw_series(LineSeries::new(points, COLOURS[0].stroke_width(1))).map_err(text)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::timeline::test_util::timeline, *};

    #[test]
    fn they_are_drawn() {
        let two = svg(&[timeline("refresh", 200.0), timeline("pre-copy", 400.0)]).unwrap();
        assert!(two.starts_with("<svg") && two.trim_end().ends_with("</svg>"));
        assert!(two.contains("refresh: 200 ms") && two.contains("pre-copy: 400 ms") && two.contains("height=\"480\""));
        assert!(!two.contains("NaN") && !two.contains("inf"));
        svg(&[]).unwrap();
    }
}

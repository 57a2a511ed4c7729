//! All figures as one HTML page that needs no other file.

use super::{
    super::plot::{Bar, Bars},
    plan::{self, Core, Net, Work, cipher_name},
    report::Figures,
    run::Run,
};
use crate::bench::output::{Table, machine};

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;font-size:13px;margin:.5rem 0 1.5rem}\
th,td{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:right}\
th:first-child,td:first-child{text-align:left}\
table.words td{text-align:left}\
svg{display:block;max-width:100%;height:auto;margin:.5rem 0}";

/// The size of each plot in pixels. It leaves room for the names of all workloads.
const SIZE: (u32, u32) = (1100, 360);

/// Escapes text for HTML.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

fn table(table: &Table, class: &str) -> String {
    let row = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let mut text = format!("<h3>{}</h3>\n<table class=\"{class}\">\n", escape(&table.title));
    text += &row("th", &mut table.head.iter().copied());
    table.rows.iter().for_each(|cells| text += &row("td", &mut cells.iter().map(String::as_str)));
    text + "</table>\n"
}

fn list(items: &[String]) -> String {
    let items: String = items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect();
    format!("<ul>\n{items}</ul>\n")
}

/// The figure of a plot.
struct Figure {
    name: &'static str,
    unit: &'static str,
    of: fn(&Run) -> Option<f64>,
    decimals: usize,
    log: bool,
}

const FIGURES: [Figure; 3] = [
    Figure { name: "Total time", unit: "s", of: |r| Some(r.total_ms? / 1e3), decimals: 2, log: false },
    Figure { name: "Downtime", unit: "ms (logarithmic)", of: |r| r.downtime_ms, decimals: 0, log: true },
    Figure { name: "Kept speed", unit: "% of before", of: |r| r.kept_percent, decimals: 0, log: false },
];

/// Draws one plot: ciphers by workload. Returns nothing if nothing of it was measured.
fn plot(
    figures: &Figures,
    figure: &Figure,
    strategy: &str,
    (net, core): (Net, Core),
) -> Result<Option<String>, String> {
    let here = || figures.runs.iter().filter(|r| (r.cell.net, r.cell.core, r.cell.strategy) == (net, core, strategy));
    let works: Vec<Work> = Work::all().into_iter().filter(|w| here().any(|r| r.cell.work == *w)).collect();
    let ciphers: Vec<_> = plan::CIPHERS.into_iter().filter(|c| here().any(|r| r.cell.cipher == *c)).collect();
    if works.is_empty() {
        return Ok(None);
    }
    let bar = |work, cipher| {
        let own = here().filter(|r| (r.cell.work, r.cell.cipher) == (work, cipher));
        Bar::of(&own.filter_map(figure.of).collect::<Vec<_>>())
    };
    let (groups, names): (Vec<_>, Vec<_>) =
        (works.iter().map(Work::to_string).collect(), ciphers.iter().map(|c| cipher_name(*c)).collect());
    let svg = Bars {
        title: &format!("{}: {strategy}, link {net}, core {core}", figure.name),
        unit: figure.unit,
        groups: groups.iter().map(String::as_str).collect(),
        names: names.iter().map(String::as_str).collect(),
        values: works.iter().map(|w| ciphers.iter().map(|c| bar(*w, *c)).collect()).collect(),
        log: figure.log,
        decimals: figure.decimals,
        size: SIZE,
    }
    .svg()?;
    // inside of an HTML page, SVG needs no namespace
    Ok(Some(svg.replace(" xmlns=\"http://www.w3.org/2000/svg\"", "")))
}

/// Returns the page.
pub(super) fn page(figures: &Figures) -> Result<String, String> {
    let title = "Encrypted live migration: what it costs";
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
         </head>\n<body>\n<h1>{title}</h1>\n<p>After Hu et al. 2015. Written by <code>minivmm eval encryption --html</code>.</p>\n"
    );
    text += &format!("<h2>The machine</h2>\n<p>{}</p>\n", escape(&machine(&figures.machine)));
    text += &format!("<h2>How it was measured</h2>\n{}", list(&figures.how()));
    text += &format!("<h2>Beside the paper</h2>\n{}", table(&figures.comparison(), "words"));
    text += "<p>The paper's figures are its own, of its machines (AES-128-CBC and 3DES-CBC in an SSH tunnel); those beside them were measured here.</p>\n";
    if !figures.left_out.is_empty() {
        text += &format!("<h2>Left out</h2>\n{}", list(&figures.left_out));
    }
    if !figures.failures.is_empty() {
        text += &format!("<h2>Failed and run again</h2>\n{}", list(&figures.failures));
    }
    for figure in &FIGURES {
        text += &format!(
            "<h2>{}</h2>\n<p>Medians, with the least and the most. What did not end has no bar.</p>\n",
            figure.name
        );
        for place in figures.places() {
            for strategy in plan::STRATEGIES {
                text += &plot(figures, figure, strategy, place)?.unwrap_or_default();
            }
        }
    }
    text += "<h2>All medians</h2>\n";
    figures.tables().iter().for_each(|medians| text += &table(medians, "figures"));
    Ok(text + "</body>\n</html>\n")
}

#[cfg(test)]
mod tests {
    use super::{super::report::test_util, *};

    #[test]
    fn the_page_stands_alone() {
        let page = page(&test_util::figures()).unwrap();
        for tag in ["table", "svg", "ul", "h2", "h3", "tr", "td", "th", "li", "p"] {
            let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert!(opened > 0 && opened == page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert_eq!(page.matches("<svg").count(), 3 * 4 * 3);
        for outside in ["http", "src=", "href=", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(!page.contains("NaN") && !page.contains(">inf"));
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("a<b> & \"c\" 'd'"), "a&lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;");
        let page = page(&test_util::figures()).unwrap();
        assert!(page.contains("a &lt;part&gt;, as &quot;it&quot; &amp; that") && !page.contains("<part>"));
    }
}

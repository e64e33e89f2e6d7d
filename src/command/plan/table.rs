//! What `allreel plan` prints.

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde_json::{Map, Value, json};

use super::Plan;
use crate::memory::{Peak, ledger::Component};

/// Bytes, for people.
fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= f64::from(1 << 30) => format!("{:.2} GiB", n / f64::from(1 << 30)),
        _ => format!("{:.1} MiB", n / f64::from(1 << 20)),
    }
}

impl Plan {
    /// Tables and lines.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![self.table(), self.peaks()];
        if !self.setting.knows_data() {
            lines.push(
                "not every file of [data] is here; those that are not count for nothing".into(),
            );
        }
        lines.extend(self.largest_line());
        lines.extend(self.verdict());
        lines.join("\n") + "\n"
    }

    fn table(&self) -> String {
        let places = self.places();
        let mut table = Table::new();
        let header = places.iter().map(|(name, _)| (*name).to_owned());
        let header = std::iter::once("one rank, at its peak".to_owned()).chain(header);
        table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
        for component in Component::ALL {
            let cells = places.iter().map(|(_, peak)| bytes(peak.usage[component]));
            table.add_row(std::iter::once(component.name().to_owned()).chain(cells));
        }
        let totals = places.iter().map(|(_, peak)| bytes(peak.usage.total()));
        table.add_row(std::iter::once("in all".to_owned()).chain(totals));
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    fn places(&self) -> Vec<(&'static str, Peak)> {
        let device = self.prediction.device.map(|peak| ("device", peak));
        std::iter::once(("host", self.prediction.host)).chain(device).collect()
    }

    fn peaks(&self) -> String {
        let peaks: Vec<String> = self
            .places()
            .iter()
            .map(|(name, peak)| format!("the {name}'s {}", peak.phase.name()))
            .collect();
        format!(
            "peak: {}; micro-batches of {} x {} tokens",
            peaks.join(", "),
            self.prediction.sequences,
            self.setting.length()
        )
    }

    fn largest_line(&self) -> Option<String> {
        let (limit, largest) = (self.limit?, self.largest?);
        let length = self.setting.length();
        Some(match largest {
            0 => format!(
                "largest batch: not one sequence of {length} tokens fits in {}",
                bytes(limit)
            ),
            n => format!(
                "largest batch: {n} x {length} tokens at a time (train.micro_tokens = {}) fit in {}",
                n * length,
                bytes(limit)
            ),
        })
    }

    fn verdict(&self) -> Option<String> {
        let limit = self.limit?;
        let needs = bytes(self.prediction.computing());
        let Some(advice) = &self.advice else {
            return Some(format!("this run fits: {needs} of {}", bytes(limit)));
        };
        let settings: Vec<String> =
            advice.settings.iter().map(|setting| format!("--set '{setting}'")).collect();
        let settings = settings.join(" ");
        let with = bytes(advice.needs);
        Some(match advice.fits {
            true => format!(
                "this run does not fit: {needs} of {}; with {settings} it needs {with}",
                bytes(limit)
            ),
            false => format!(
                "this run does not fit: {needs} of {}, and not with {settings} either ({with}); [adapter] with \
                 model.quantization, a smaller model or a shorter data.max_length need less",
                bytes(limit)
            ),
        })
    }

    /// One JSON object, in bytes.
    pub(super) fn json(&self) -> Value {
        let peak = |peak: &Peak| {
            let mut components = Map::new();
            for component in Component::ALL {
                let name = serde_json::to_value(component).unwrap_or_default();
                let name = name.as_str().unwrap_or_default().to_owned();
                components.insert(name, json!(peak.usage[component]));
            }
            json!({ "phase": peak.phase, "bytes": peak.usage.total(), "components": components })
        };
        let place = self.setting.place();
        json!({
            "host": peak(&self.prediction.host),
            "device": self.prediction.device.as_ref().map(peak),
            "sequences": self.prediction.sequences,
            "length": self.setting.length(),
            "ranks": place.ranks,
            "limit": self.limit,
            "largest_sequences": self.largest,
            "fits": self.limit.map(|_| self.advice.is_none()),
            "advice": self.advice.as_ref().map(|advice| {
                json!({ "set": advice.settings, "bytes": advice.needs, "fits": advice.fits })
            }),
        })
    }
}

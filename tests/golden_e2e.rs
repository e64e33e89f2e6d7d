//! Text in, probabilities out: what `allreel predict` computes equals Hugging Face's pipeline.

use allreel::{
    config::{Trainable, Truncation},
    data::{Cleaning, Limit, Review, TokenSet, Tokenizer},
    device::Placement,
    model::{Classifier, Dropouts},
    step::evaluate::probabilities,
};

use crate::support::{VALUES, golden};

#[test]
fn golden_e2e_bert() {
    check("e2e_bert");
}

#[test]
fn golden_e2e_deberta_v3() {
    check("e2e_deberta_v3");
}

fn check(folder: &str) {
    let Some(golden) = golden() else { return };
    let dir = golden.join(folder);
    let text = std::fs::read_to_string(dir.join("expected.json")).expect("expected.json");
    let expected: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let examples = expected["examples"].as_array().expect("examples");
    let max_length = expected["max_length"].as_u64().expect("max_length") as usize;

    let reviews: Vec<Review> = examples
        .iter()
        .map(|example| Review {
            id: String::new(),
            text: example["text"].as_str().expect("text").into(),
            label: None,
        })
        .collect();
    let tokenizer = Tokenizer::load(&dir).expect("a tokenizer");
    let limit = Limit { max_length, truncation: Truncation::Head };
    let set = TokenSet::build(&reviews, Cleaning::None, &tokenizer, &limit).expect("tokens");
    let (classifier, report) =
        Classifier::load(&Placement::CPU, &dir, Dropouts::default(), Trainable::Head, 2, 0)
            .expect("a checkpoint");
    assert_eq!(report, Default::default());
    let rows = probabilities(&classifier, &set, 64, |_| ()).expect("probabilities");

    assert!(!examples.is_empty());
    for ((example, row), i) in examples.iter().zip(&rows).zip(0..) {
        let numbers = |name: &str| -> Vec<f64> {
            serde_json::from_value(example[name].clone()).expect("numbers")
        };
        // The reference pads; what is padding there does not exist here.
        let ids: Vec<u32> = numbers("ids").iter().map(|id| *id as u32).collect();
        let own = set.sequence(i);
        assert_eq!(own, &ids[..own.len()], "{}", example["text"]);
        let padding = classifier.config.plan.embeddings.words.padding;
        assert!(ids[own.len()..].iter().all(|id| Some(*id) == padding));
        VALUES.check("probabilities", row, &numbers("probs"));
    }
}

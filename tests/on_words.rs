//! Networks on word vectors: every gradient, what stays frozen, and what a run of one leaves behind.

use allreel::{
    config::Trainable,
    device::Placement,
    model::{Classifier, Family, Training},
};

use crate::{adapters::check_slope, support::small};

#[test]
fn gradients_of_every_network_on_words_match_finite_differences() {
    for family in Family::ON_WORDS {
        check_slope("all of it", family, &Trainable::All.into());
        let frozen = Training { freeze_embeddings: true, ..Training::default() };
        check_slope("over frozen vectors", family, &frozen);
        check_slope("its head", family, &Trainable::Head.into());
    }
}

#[test]
fn frozen_vectors_take_no_gradient() {
    for family in Family::ON_WORDS {
        let frozen = Training { freeze_embeddings: true, ..Training::default() };
        let model = Classifier::new(&Placement::CPU, small(family), frozen, 3).expect("a network");
        assert_eq!(model.words_bucket(), None, "{family:?}");
        let trains = |name: &str| model.parameters.trained().any(|trained| trained == name);
        assert!(!trains("embedding.weight") && trains("classifier.weight"), "{family:?}");
    }
}

"""The quickstart corpus: a split by topic that keeps repeated text on one side."""

import pydoc_data.topics

from grok.quickstart import corpus


def test_files_hold_every_topic_once(tmp_path):
    train, heldout = corpus.write_corpus(tmp_path / "new" / "folder")
    train_text, heldout_text = train.read_text("utf-8"), heldout.read_text("utf-8")
    names = corpus.heldout_topics(pydoc_data.topics.topics)
    for topic, text in pydoc_data.topics.topics.items():
        assert text.strip("\n") in (heldout_text if topic in names else train_text)
    sizes = train.stat().st_size, heldout.stat().st_size
    total = sum(len(text.encode()) for text in pydoc_data.topics.topics.values())
    assert abs(sum(sizes) - total) < 0.01 * total
    assert 0.05 < sizes[1] / sum(sizes) < 0.11


def test_twice_gives_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in corpus.write_corpus(tmp_path / "a")]
    assert first == [path.read_bytes() for path in corpus.write_corpus(tmp_path / "b")]


def test_no_heldout_paragraph_is_in_the_training_text(tmp_path):
    train, heldout = (path.read_text("utf-8") for path in corpus.write_corpus(tmp_path))
    assert not corpus._paragraphs(train) & corpus._paragraphs(heldout)


def test_topics_that_share_a_paragraph_stay_together():
    shared = [f"paragraph {n} " + "word " * 20 for n in range(2)]
    topics = {
        "a": shared[0],
        "b": f"{shared[0]}\n\n   {shared[1]}",
        "c": shared[1].replace("word word", "word\n   word"),
        "d": "short\n\nother " + "text " * 20,
        "e": "short\n\nmore " + "text " * 20,
    }
    groups = corpus._groups(topics)
    assert sorted(groups) == [["a", "b", "c"], ["d"], ["e"]]

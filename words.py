"""Prompts to words, in any script."""

import re
import unicodedata
from functools import lru_cache

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Tai, Javanese, kana and Han
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007"
SPACELESS += "\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff"
SPACELESS += "\uff66-\uff9f\U00020000-\U0003ffff"
# Combining marks, such as the vowel signs of Hindi and Thai, and the joiners between letters
MARKS = "".join(
    c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c).startswith("M")
)
MARKS += "\u200c\u200d"
LETTER = rf"[^\W{SPACELESS}]"
WORD = re.compile(rf"{LETTER}(?:{LETTER}+|[{MARKS}'-]+)*|\w[{MARKS}]*")


@lru_cache(maxsize=1 << 16)  # many rows of a data set share a prompt
def split_words(prompt):
    """The words of a prompt in lower case, without punctuation; the characters where a script
    puts no spaces between words. Combining marks stay with their letter."""
    return WORD.findall(unicodedata.normalize("NFC", prompt.lower()))

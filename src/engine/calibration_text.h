// About a thousand tokens of prose and code, written for this project: what the equaliser of a
// model is measured on. Any text does; this one mixes registers so that no channel stays silent.
#pragma once

#include <string_view>

namespace thriftattn {

inline constexpr std::string_view kCalibrationText =
    R"(The harbour master kept two ledgers. In the first she wrote what the ships declared: 214 barrels
of salted herring, 36 bolts of blue cloth, one crate marked "instruments - fragile". In the second,
which she showed to nobody, she wrote what the ships smelled of. After eleven years the second
ledger was by far the more accurate. A captain may forget a barrel, she liked to say, but tar,
cinnamon and gunpowder never forget themselves.

On the morning of 3 March a schooner came in without a flag. It drew too little water for the cargo
it declared, and its mate answered every question a moment before it was asked. "Where from?"
"Lisbon." "How long?" "Nineteen days, and fair wind all the way." The wind had blown from the east
for three weeks; everybody on the quay knew it. She smiled, stamped the paper, and sent the boy for
the customs officer by the back stairs.

## How to read a measurement

A number without a unit is a rumour; a number without an error is an opinion. Suppose a scale shows
72.4 kg five times in a row. The spread is zero, yet the scale may still be wrong by two kilograms:
repeating a measurement reveals its noise, never its bias. To find the bias one needs a second,
independent instrument, or an object whose weight is known. The same holds for programs. A benchmark
that is run a hundred times on a machine with a warm cache is precise, and it is precisely wrong for
the user whose cache is cold.

1. Write down what you expect before you look.
2. Change one thing at a time.
3. Keep the raw data; averages can be computed again, raw data cannot.

```python
from dataclasses import dataclass
from typing import Iterator


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def width(self) -> float:
        return self.high - self.low

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


def merge(intervals: list[Interval]) -> Iterator[Interval]:
    """Yield the union of the intervals, sorted, without overlaps."""
    current = None
    for item in sorted(intervals, key=lambda i: (i.low, i.high)):
        if current is None:
            current = item
        elif current.overlaps(item):
            current = Interval(current.low, max(current.high, item.high))
        else:
            yield current
            current = item
    if current is not None:
        yield current


assert list(merge([Interval(0, 2), Interval(1, 5), Interval(7, 9)])) == [
    Interval(0, 5),
    Interval(7, 9),
]
```

Q: Why does the merge sort its input first?
A: Because then an interval can only overlap the one that was seen last. Without the order every new
interval would have to be compared with all the earlier ones, which takes n * (n - 1) / 2 steps
instead of n * log(n).

| city      | founded | population | river   |
|-----------|---------|------------|---------|
| Tarnwick  | 1187    | 48,210     | Ede     |
| Osterholm | 1342    | 7,905      | -       |
| Vale Cross| 1699    | 112,480    | Lower Ede |

```c
/* Returns the index of the first element that is not less than key, or n. */
size_t lower_bound(const int *a, size_t n, int key) {
  size_t lo = 0, hi = n;
  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;   /* never overflows */
    if (a[mid] < key) lo = mid + 1; else hi = mid;
  }
  return lo;
}
```

{"id": 4711, "status": "ok", "items": [{"sku": "A-9", "qty": 3, "price": 12.50}, {"sku": "B-17",
"qty": 1, "price": 0.99}], "note": null}

The officer arrived with four men and a dog. They opened the hold at noon and found, under a layer
of cork, ninety-six clocks, all of them running and no two showing the same time. Nobody in the town
could say what law had been broken. In the end the clocks were auctioned for the benefit of the
school, and for a whole generation the children of Tarnwick learned to read the hour as a matter of
debate. The harbour master bought none. She went home, opened the second ledger, and wrote under the
date: brass, whale oil, and a little fear.
)";

}  // namespace thriftattn

// Counting a row against a query's thresholds; a part of simd_body.hpp.
//
// Two passes over each block of the row while it is in the L1 cache. The first keeps what is not
// above the highest threshold: little, in the rows of a good network. The second counts what is
// kept ("tally"): by a search in registers, Table::MOST thresholds at a time; without tables,
// against each threshold; with very many thresholds, by a search in memory.

constexpr std::int64_t GROUP = 3;     // vectors: see tally_by_table
constexpr std::int64_t BLOCK = 2016;  // elements, whole groups; at most 255 vectors

// Finds places by a Table of the instruction set: those of 16 (32) elements in 4 (5) steps, each
// of them one permutation of the thresholds in a register and one comparison. Places become 16
// counters of 2 bits in a lane's 32; they are widened to 4 bits after a group, to 8 after five.
// n: whole groups, at most 255 vectors. k: at most Table::MOST. Returns the number of NaNs.
template <class V, class Table>
inline std::int64_t tally_by_table(const float* x, std::int64_t n, const float* thresholds,
                                   std::int64_t k, std::int64_t* counts, std::int64_t& equal) {
    constexpr int WORDS = Table::WORDS;
    const Table table(thresholds, k);
    typename V::Counter same = V::zero(), bytes[WORDS][4];
    for (int w = 0; w < WORDS; ++w) {
        for (int b = 0; b < 4; ++b) bytes[w][b] = V::zero();
    }
    const float* const end = x + n;
    while (x < end) {
        typename V::Counter nibbles[WORDS][2];
        for (int w = 0; w < WORDS; ++w) nibbles[w][0] = nibbles[w][1] = V::zero();
        for (int group = 0; group < 5 && x < end; ++group, x += GROUP * V::WIDTH) {
            typename V::Counter pairs[WORDS];
            for (int w = 0; w < WORDS; ++w) pairs[w] = V::zero();
            for (int v = 0; v < GROUP; ++v) table.add(V::load(x + v * V::WIDTH), pairs, same);
            for (int w = 0; w < WORDS; ++w) {
                nibbles[w][0] = V::plus(nibbles[w][0], V::fields(pairs[w], 0x33333333));
                nibbles[w][1] =
                    V::plus(nibbles[w][1], V::fields(V::template down<2>(pairs[w]), 0x33333333));
            }
        }
        for (int w = 0; w < WORDS; ++w) {
            for (int b = 0; b < 4; ++b) {
                const typename V::Counter from = nibbles[w][b % 2];
                bytes[w][b] = V::plus(
                    bytes[w][b],
                    V::fields(b < 2 ? from : V::template down<4>(from), 0x0f0f0f0f));
            }
        }
    }
    std::int64_t at[16 * WORDS];
    for (int w = 0; w < WORDS; ++w) {
        for (int b = 0; b < 4; ++b) {
            // Places b, b + 4, b + 8, b + 12, two at a time in the halves of 32 bits.
            const auto even =
                static_cast<std::uint32_t>(V::sum(V::fields(bytes[w][b], 0x00ff00ff)));
            const auto odd = static_cast<std::uint32_t>(
                V::sum(V::fields(V::template down<8>(bytes[w][b]), 0x00ff00ff)));
            at[16 * w + b] = even & 0xffff;
            at[16 * w + b + 4] = odd & 0xffff;
            at[16 * w + b + 8] = even >> 16;
            at[16 * w + b + 12] = odd >> 16;
        }
    }
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < k; ++i) counts[i] += total += at[i];
    equal += V::sum(same);
    return at[16 * WORDS - 1];
}

// At most 8 thresholds at once, each with its counter in a register.
template <class V, int K>
inline void count_few(const typename V::Scalar* x, std::int64_t n,
                      const typename V::Scalar* thresholds, std::int64_t* counts,
                      std::int64_t& equal) {
    typename V::Vector t[K];
    typename V::Counter c[K], same = V::zero();
    for (int k = 0; k < K; ++k) {
        t[k] = V::same(thresholds[k]);
        c[k] = V::zero();
    }
    std::int64_t j = 0;
    for (; j + V::WIDTH <= n; j += V::WIDTH) {
        const typename V::Vector v = V::load(x + j);
        typename V::Mask any = V::none();
        for (int k = 0; k < K; ++k) {
            c[k] = V::add(c[k], V::at_most(v, t[k]));
            any = V::either(any, V::equal(v, t[k]));
        }
        same = V::add(same, any);
    }
    for (int k = 0; k < K; ++k) counts[k] += V::sum(c[k]);
    equal += V::sum(same);
    const int rest = static_cast<int>(n - j);  // less than a vector
    x += j;
    for (int i = 0; i < rest; ++i) {
        for (int k = 0; k < K; ++k) {
            counts[k] += x[i] <= thresholds[k];
            equal += x[i] == thresholds[k];
        }
    }
}

template <class V>
inline void tally_each(const typename V::Scalar* x, std::int64_t n,
                       const typename V::Scalar* thresholds, std::int64_t k, std::int64_t* counts,
                       std::int64_t& equal) {
    std::int64_t i = 0;
    for (; i + 8 <= k; i += 8) count_few<V, 8>(x, n, thresholds + i, counts + i, equal);
    for (; i + 2 <= k; i += 2) count_few<V, 2>(x, n, thresholds + i, counts + i, equal);
    if (i < k) count_few<V, 1>(x, n, thresholds + i, counts + i, equal);
}

// `counts` are differences: see there.
template <class T>
inline void tally_by_search(const T* x, std::int64_t n, const T* thresholds, std::int64_t k,
                            std::int64_t* counts, std::int64_t& equal) {
    std::int32_t place[STEP];
    for (std::int64_t begin = 0; begin < n; begin += STEP) {
        const int m = static_cast<int>(n - begin < STEP ? n - begin : STEP);
        find_places<false>(x + begin, m, thresholds, k, place);
        for (int j = 0; j < m; ++j) {
            if (place[j] == k) continue;
            ++counts[place[j]];
            equal += x[begin + j] == thresholds[place[j]];
        }
    }
}

// Counts what was kept; returns the number of NaNs. `x` may be written to beyond n, up to a group.
template <class V>
class Tally {
  public:
    using Scalar = typename V::Scalar;

    Tally(const Scalar* thresholds, std::int64_t k, std::int64_t* counts)
        : thresholds_(thresholds),
          k_(k),
          counts_(counts),
          search_(k >= (V::TABLES > 0 ? TABLES_UP_TO : SEARCH_FROM)) {
        if (search_) differences(counts_, k_);
    }

    Counted finish() {
        if (search_) sums(counts_, k_);
        return found_;
    }

    // At most BLOCK elements; whole groups of vectors, but for `padding` NaNs at their end.
    void block(const Scalar* x, std::int64_t n, std::int64_t padding = 0) {
        if constexpr (V::TABLES) {
            if (!search_) {
                std::int64_t nans = 0;
                for (std::int64_t i = 0; i < k_;) nans = table(x, n, i);
                found_.nans += nans - padding;
                return;
            }
        }
        n -= padding;
        if (search_) {
            tally_by_search(x, n, thresholds_, k_, counts_, found_.equal);
        } else {
            tally_each<V>(x, n, thresholds_, k_, counts_, found_.equal);
        }
        for (std::int64_t j = 0; j < n; ++j) found_.nans += x[j] != x[j];
    }

    // Counted elements so far; a search in memory gives only those above the second highest.
    std::int64_t at_most_highest() const { return counts_[k_ - 1]; }

  private:
    std::int64_t table(const Scalar* x, std::int64_t n, std::int64_t& i) {
        const std::int64_t left = k_ - i, from = i;
        if constexpr (V::TABLES > 1) {
            using Wide = typename V::Wide;
            if (left > V::Narrow::MOST) {
                const std::int64_t some = left < Wide::MOST ? left : Wide::MOST;
                i += some;
                return tally_by_table<V, Wide>(x, n, thresholds_ + from, some, counts_ + from,
                                               found_.equal);
            }
        }
        using Narrow = typename V::Narrow;
        const std::int64_t some = left < Narrow::MOST ? left : Narrow::MOST;
        i += some;
        return tally_by_table<V, Narrow>(x, n, thresholds_ + from, some, counts_ + from,
                                         found_.equal);
    }

    const Scalar* thresholds_;
    std::int64_t k_;
    std::int64_t* counts_;
    bool search_;
    Counted found_{0, 0};
};

// kept = the elements of a block that are not above `top`; returns how many. Up to a vector's width
// of elements more may be written.
template <class V>
inline std::int64_t keep(const typename V::Scalar* x, std::int64_t n, typename V::Scalar top,
                         typename V::Scalar* kept) {
    const typename V::Vector t = V::same(top);
    std::int64_t count = 0, j = 0;
    for (; j + V::WIDTH <= n; j += V::WIDTH) {
        prefetch(x + j + BLOCK);  // memory works on while this block is counted
        const typename V::Vector v = V::load(x + j);
        count += V::keep(x + j, V::not_above(v, t), kept + count);
    }
    for (; j < n; ++j) {
        if (!(x[j] > top)) kept[count++] = x[j];
    }
    return count;
}

template <class V>
Counted count_at_most(const typename V::Scalar* x, std::int64_t n,
                      const typename V::Scalar* thresholds, std::int64_t k, std::int64_t* counts) {
    using Scalar = typename V::Scalar;
    Scalar kept[2 * BLOCK + 64];
    Tally<V> tally(thresholds, k, counts);
    const Scalar top = thresholds[k - 1];
    std::int64_t waiting = 0;
    bool most = false;  // of the last block was kept: then this block is counted in place
    for (std::int64_t begin = 0; begin < n; begin += BLOCK) {
        const std::int64_t m = n - begin < BLOCK ? n - begin : BLOCK;
        if (most && m == BLOCK) {
            const std::int64_t before = tally.at_most_highest();
            tally.block(x + begin, BLOCK);
            most = 2 * (tally.at_most_highest() - before) > BLOCK;
            continue;
        }
        const std::int64_t found = keep<V>(x + begin, m, top, kept + waiting);
        most = 2 * found > m;
        waiting += found;
        if (waiting < BLOCK) continue;
        tally.block(kept, BLOCK);
        waiting -= BLOCK;
        std::memcpy(kept, kept + BLOCK, static_cast<std::size_t>(waiting) * sizeof(Scalar));
    }
    std::int64_t padded = waiting;
    while (padded % (GROUP * V::WIDTH) != 0) {
        kept[padded++] = std::numeric_limits<Scalar>::quiet_NaN();
    }
    if (padded > 0) tally.block(kept, padded, padded - waiting);
    return tally.finish();
}

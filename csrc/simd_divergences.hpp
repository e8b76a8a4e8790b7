// The inner loops of the divergences besides the paper's (simd_body.hpp includes this after
// simd_loss.hpp): no include guard, no headers. The order of sums is as there.

#if defined(__GNUC__)
#define DML_FAST_INLINE __attribute__((always_inline))
#else
#define DML_FAST_INLINE
#endif

// The elements of an array, or those of its end that are there; the others are 0.
inline Floats::Vector load_part(const float* from, const Floats::Part* valid) {
    return valid ? Floats::load(from, *valid) : Floats::load(from);
}

inline void store_part(float* to, Floats::Vector x, const Floats::Part* valid) {
    valid ? Floats::store(to, x, *valid) : Floats::store(to, x);
}

// Calls work(part of a block, place, elements that are there or null for all).
template <class Work>
DML_FAST_INLINE inline void for_parts(std::int64_t n, const Work& work) {
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) {
        for (int i = 0; i < LOSS_PARTS; ++i) work(i, j + i * Floats::WIDTH, nullptr);
    }
    for (int i = 0; i < LOSS_PARTS; ++i) {
        const std::int64_t at = j + i * Floats::WIDTH;
        if (at >= n) break;
        const Floats::Part valid = Floats::part(n - at);
        work(i, at, &valid);
    }
}

// a = (z - largest) / temperature, rounded as in soften().
inline Floats::Vector log_part(const LogView& view, std::int64_t at, float per_temperature,
                               const Floats::Part* valid) {
    using F = Floats;
    const F::Vector below = F::minus(load_part(view.z + at, valid), F::same(view.largest));
    return F::times(below, F::same(per_temperature));
}

void add_logs(const LogView* views, std::int64_t count, std::int64_t n, float per_temperature,
              float* sum) {
    for_parts(n, [&](int, std::int64_t at, const Floats::Part* valid) DML_FAST_INLINE {
        const Floats::Vector first = log_part(views[0], at, per_temperature, valid);
        Floats::Vector all = Floats::same(0.0f);
        for (std::int64_t l = 1; l < count; ++l) {
            const Floats::Vector a = log_part(views[l], at, per_temperature, valid);
            const Floats::Vector d = Floats::minus(a, first);
            all = Floats::plus(all, Floats::minus(d, Floats::same(views[l].shift)));
        }
        store_part(sum + at, all, valid);
    });
}

double gap_of(const LogView& view, const LogView& first, float count, const float* sum,
              const float* w, std::int64_t n, float per_temperature, float* gap) {
    using F = Floats;
    LossLanes products;
    for_parts(n, [&](int i, std::int64_t at, const F::Part* valid) DML_FAST_INLINE {
        const F::Vector a = log_part(view, at, per_temperature, valid);
        const F::Vector d = F::minus(F::minus(a, log_part(first, at, per_temperature, valid)),
                                     F::same(view.shift));
        const F::Vector x = F::minus(F::times(d, F::same(count)), load_part(sum + at, valid));
        products.part[i] = F::fused(load_part(w + at, valid), x, products.part[i]);
        store_part(gap + at, x, valid);
    });
    return products.sum();
}

// From both ends, so that no student's own part has to be subtracted.
void mix_others(const float* const* w, const float* factor, std::int64_t count,
                std::int64_t students, std::int64_t n, float* const* mean) {
    using F = Floats;
    for_parts(n, [&](int, std::int64_t at, const F::Part* valid) DML_FAST_INLINE {
        const auto share = [&](std::int64_t l) DML_FAST_INLINE {
            return F::times(load_part(w[l] + at, valid), F::same(factor[l]));
        };
        F::Vector after = F::same(0.0f), before = after;
        for (std::int64_t l = count - 1; l >= 0; --l) {
            if (l < students) store_part(mean[l] + at, after, valid);
            after = F::plus(after, share(l));
        }
        for (std::int64_t l = 1; l < students; ++l) {
            before = F::plus(before, share(l - 1));
            store_part(mean[l] + at, F::plus(before, load_part(mean[l] + at, valid)), valid);
        }
    });
}

// log(y) where y is a normal number: y = 2^n m with m in [sqrt(1/2), sqrt(2)), and with f = m - 1
// log(m) = f - f^2 / 2 + f^3 p(f). Of all p of degree 7 this one has the smallest error: 6e-9.
inline Floats::Vector log_of(Floats::Vector y) {
    using F = Floats;
    F::Vector n;
    const F::Vector f = F::minus(F::mantissa(y, n), F::same(1.0f));
    F::Vector p = F::same(-7.634499669075012e-2f);
    p = F::fused(p, f, F::same(0.127615824341774f));
    p = F::fused(p, f, F::same(-0.13160184025764465f));
    p = F::fused(p, f, F::same(0.14201757311820984f));
    p = F::fused(p, f, F::same(-0.16623356938362122f));
    p = F::fused(p, f, F::same(0.20001226663589478f));
    p = F::fused(p, f, F::same(-0.2500081956386566f));
    p = F::fused(p, f, F::same(0.3333333134651184f));
    F::Vector log = F::fused(F::times(f, f), F::fused(p, f, F::same(-0.5f)), f);
    log = F::fused(n, F::same(-2.12194440e-4f), log);  // log 2 in two parts
    return F::fused(n, F::same(0.693359375f), log);
}

// log(m / p), m = p + share (other - p): without cancellation where m is near p; finite, and of no
// meaning where p is 0.
inline Floats::Vector log_of_mixture(Floats::Vector p, Floats::Vector other, float share,
                                     float rest) {
    using F = Floats;
    const F::Vector tiny = F::same(std::numeric_limits<float>::min()), one = F::same(1.0f);
    const F::Vector half = F::same(0.5f), least = F::larger(p, tiny);
    const F::Vector near = F::over(F::times(F::minus(other, p), F::same(share)), least);
    const F::Vector both = F::fused(other, F::same(share), F::times(p, F::same(rest)));
    const F::Vector far = F::larger(F::over(both, least), tiny);
    const F::Vector size = F::larger(near, F::minus(F::same(0.0f), near));
    const F::Vector close = F::minus(near, F::zero_below(near, size, half));  // near, or 0
    const F::Vector sum = F::plus(one, close);
    const F::Vector lost = F::minus(close, F::minus(sum, one));
    // 1 + near or far: where it is far, the first is 1.
    const F::Vector y = F::plus(F::minus(sum, F::zero_below(one, size, half)),
                                F::zero_below(far, size, half));
    return F::plus(log_of(y), F::over(lost, y));
}

void mixture_logs(const float* w, float reciprocal, float beta, float rest, std::int64_t n,
                  float* mean, MixtureSums& sums) {
    using F = Floats;
    LossLanes terms, middle;
    for_parts(n, [&](int i, std::int64_t at, const F::Part* valid) DML_FAST_INLINE {
        const F::Vector p = F::times(load_part(w + at, valid), F::same(reciprocal));
        const F::Vector others = load_part(mean + at, valid);
        const F::Vector own = log_of_mixture(p, others, beta, rest);
        const F::Vector theirs = log_of_mixture(others, p, rest, beta);
        const F::Vector product = F::times(p, own);
        middle.add(i, product);
        // Class by class: the first orders of the two cancel.
        terms.add(i, F::fused(F::times(others, F::same(beta)), theirs,
                              F::times(product, F::same(rest))));
        store_part(mean + at, own, valid);
    });
    sums.divergence -= terms.sum();
    sums.middle += middle.sum();
}

void pull(const float* w, const float* x, float middle, float by, std::int64_t n, float* grad) {
    using F = Floats;
    for_parts(n, [&](int, std::int64_t at, const F::Part* valid) DML_FAST_INLINE {
        const F::Vector factor = F::times(load_part(w + at, valid), F::same(by));
        const F::Vector above = F::minus(load_part(x + at, valid), F::same(middle));
        store_part(grad + at, F::fused(factor, above, load_part(grad + at, valid)), valid);
    });
}
#undef DML_FAST_INLINE

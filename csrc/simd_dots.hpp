// Dot products of many rows with many (simd_body.hpp includes this): no include guard, no headers.
//
// Each lane is a sum of its own, so one vector of lanes after the other goes through all elements,
// for a tile of DOT_ROWS x DOT_COLUMNS pairs whose sums fit in registers.

#if defined(__clang__)
#define DML_FAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define DML_FAST_UNROLL _Pragma("GCC unroll 8")
#else
#define DML_FAST_UNROLL
#endif

using DotLanes = double[DOT_ROWS * DOT_COLUMNS][DOT_LANES];

// The elements begin, begin + DOT_LANES, ... < n and their neighbours in a vector.
template <class T>
inline void sum_lanes(const double* const* x, const T* const* y, int begin, std::int64_t n,
                      DotLanes& lanes) {
    using Vector = Doubles::Vector;
    Vector sums[DOT_ROWS][DOT_COLUMNS];
    DML_FAST_UNROLL
    for (int r = 0; r < DOT_ROWS; ++r) {
        DML_FAST_UNROLL
        for (int c = 0; c < DOT_COLUMNS; ++c) sums[r][c] = Doubles::same(0.0);
    }
    for (std::int64_t i = begin; i < n; i += DOT_LANES) {
        Vector right[DOT_COLUMNS];
        DML_FAST_UNROLL
        for (int c = 0; c < DOT_COLUMNS; ++c) right[c] = Doubles::widen(y[c] + i);
        DML_FAST_UNROLL
        for (int r = 0; r < DOT_ROWS; ++r) {
            const Vector left = Doubles::load(x[r] + i);
            DML_FAST_UNROLL
            for (int c = 0; c < DOT_COLUMNS; ++c) {
                // A product of float32 is exact (see `dot`): only then may it be fused.
                sums[r][c] = Doubles::add_product<sizeof(T) == 4>(sums[r][c], left, right[c]);
            }
        }
    }
    DML_FAST_UNROLL
    for (int r = 0; r < DOT_ROWS; ++r) {
        DML_FAST_UNROLL
        for (int c = 0; c < DOT_COLUMNS; ++c) {
            Doubles::store(lanes[r * DOT_COLUMNS + c] + begin, sums[r][c]);
        }
    }
}
#undef DML_FAST_UNROLL

template <class T>
void dots(const double* a, std::int64_t rows, const T* b, std::int64_t columns, std::int64_t n,
          double* out, std::int64_t stride) {
    const auto least = [](std::int64_t x, std::int64_t y) { return x < y ? x : y; };
    const std::int64_t whole = n / DOT_LANES * DOT_LANES;
    DotLanes lanes;
    for (std::int64_t column = 0; column < columns; column += DOT_COLUMNS) {
        const T* y[DOT_COLUMNS];  // beyond the end the last one again
        for (int c = 0; c < DOT_COLUMNS; ++c) y[c] = b + least(column + c, columns - 1) * n;
        const std::int64_t wide = least(DOT_COLUMNS, columns - column);
        for (std::int64_t row = 0; row < rows; row += DOT_ROWS) {
            const double* x[DOT_ROWS];
            for (int r = 0; r < DOT_ROWS; ++r) x[r] = a + least(row + r, rows - 1) * n;
            for (int begin = 0; begin < DOT_LANES; begin += Doubles::WIDTH) {
                sum_lanes(x, y, begin, whole, lanes);
            }
            const std::int64_t high = least(DOT_ROWS, rows - row);
            for (std::int64_t r = 0; r < high; ++r) {
                for (std::int64_t c = 0; c < wide; ++c) {
                    auto& sums = lanes[r * DOT_COLUMNS + c];
                    for (std::int64_t i = whole; i < n; ++i) {
                        sums[i - whole] += x[r][i] * static_cast<double>(y[c][i]);
                    }
                    out[(row + r) * stride + column + c] = sum_of(sums);
                }
            }
        }
    }
}

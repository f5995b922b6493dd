// Random weights, and their bytes as docs/format.md has them: written anew here, so that what the library packs and
// what it reads cannot be wrong in the same way.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

enum { BLOCKS = 1, BITMASK = 2 };
enum { F32 = 0, BF16 = 1, I8 = 2 };

struct Random {
    uint64_t state;

    uint64_t next() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return n ? uint32_t(next() % n) : 0; }
    double uniform() { return double(next() >> 11) * 0x1p-53; }
    bool chance(double p) { return uniform() < p; }
    float normal() { return float((uniform() + uniform() + uniform() + uniform() - 2) * 1.7); }
    int integer(int most) { return int(below(uint32_t(2 * most + 1))) - most; }

    template <class T, size_t N>
    T of(const T (&choices)[N]) {
        return choices[below(N)];
    }
};

// Memory of exactly so many bytes from ``offset`` on, so that a sanitizer sees every step beyond.
template <class T>
struct Exact {
    explicit Exact(size_t count, size_t offset = 0)
        : base(static_cast<char*>(std::malloc(count * sizeof(T) + offset))), size(count) {
        at = reinterpret_cast<T*>(base + offset);
    }
    ~Exact() { std::free(base); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;
    T& operator[](size_t i) { return at[i]; }

    char* base;
    T* at;
    size_t size;
};

struct Weight {
    uint32_t rows, cols;
    int format, value;
    uint32_t height, index;
    std::vector<std::vector<uint32_t>> columns;  // of the blocks of every block row
    std::vector<float> values;                   // height for each block, as stored
    std::vector<float> scales;                   // of every row; 1 but for int8

    size_t count() const { return values.size() / height; }
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float random_value(Random& random, int value, bool integers) {
    if (value == I8) return float(random.integer(integers ? 7 : 127));
    if (integers) return float(random.integer(7));
    // Not an "and" with a constant: GCC 12 drops it where it stands after an ``if``.
    const int lost = value == BF16 ? 16 : 0;
    const uint32_t bits = bits_of(random.normal()) >> lost << lost;
    float kept;
    std::memcpy(&kept, &bits, 4);
    return kept;
}

inline uint32_t least_index(const Weight& w) {
    for (const auto& row : w.columns) {
        uint32_t before = 0;
        for (uint32_t column : row) {
            if (column - before > 255) return w.cols <= 65536 ? 2 : 4;
            before = column;
        }
    }
    return 1;
}

// integers: values and scales for which float32 sums are exact.
inline Weight random_weight(Random& random, uint32_t rows, uint32_t cols, bool integers) {
    static const double DENSITIES[] = {0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1};
    static const uint32_t HEIGHTS[] = {1, 4, 16};
    Weight w{rows, cols, random.chance(0.25) ? BITMASK : BLOCKS, int(random.below(3)), 1, 0, {}, {}, {}};
    if (w.format == BLOCKS) w.height = random.of(HEIGHTS);
    w.columns.resize((rows + w.height - 1) / w.height);
    const double density = random.of(DENSITIES);
    for (auto& row : w.columns) {
        const double here = random.chance(0.05) ? 0 : random.chance(0.05) ? 1 : density;
        for (uint32_t c = 0; c < cols; c++)
            if (here > 0 && random.chance(here)) row.push_back(c);
        for (size_t i = 0; i < row.size() * w.height; i++) w.values.push_back(random_value(random, w.value, integers));
    }
    for (uint32_t r = 0; r < rows; r++)
        w.scales.push_back(w.value != I8 ? 1.0f : integers ? 0.5f : float(0.001 + random.uniform()));
    if (w.format == BITMASK) return w;
    const uint32_t least = least_index(w);
    const uint32_t more = cols <= 65536 ? 2 : 4;
    w.index = random.chance(0.5) ? least : random.chance(0.7) ? more : 4;
    return w;
}

inline size_t to_64(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
void put(std::vector<uint8_t>& bytes, size_t at, T value) {
    std::memcpy(bytes.data() + at, &value, sizeof value);
}

inline std::vector<uint8_t> pack(const Weight& w) {
    const size_t words = (size_t(w.cols) + 63) / 64, wide = w.value == F32 ? 4 : w.value == BF16 ? 2 : 1;
    const size_t starts = 64, indices = starts + to_64((w.columns.size() + 1) * 4);
    const size_t values = indices + to_64(w.format == BITMASK ? w.rows * words * 8 : w.count() * w.index);
    const size_t scales = values + to_64(w.values.size() * wide) + 64;
    std::vector<uint8_t> bytes(scales + (w.value == I8 ? to_64(size_t(w.rows) * 4) : 0));
    std::memcpy(bytes.data(), "SECATEUR", 8);
    const uint8_t kind[] = {1, uint8_t(w.format), uint8_t(w.value), uint8_t(w.height), uint8_t(w.index)};
    std::memcpy(bytes.data() + 8, kind, sizeof kind);
    put(bytes, 16, w.rows), put(bytes, 20, w.cols), put(bytes, 24, uint64_t(w.count()));
    uint32_t block = 0;
    for (size_t row = 0; row < w.columns.size(); row++) {
        put(bytes, starts + row * 4, block);
        uint32_t before = 0;
        for (uint32_t column : w.columns[row]) {
            if (w.format == BITMASK) bytes[indices + row * words * 8 + column / 8] |= uint8_t(1u << column % 8);
            if (w.index == 1) bytes[indices + block] = uint8_t(column - before);
            if (w.index == 2) put(bytes, indices + size_t(block) * 2, uint16_t(column));
            if (w.index == 4) put(bytes, indices + size_t(block) * 4, column);
            before = column;
            block++;
        }
    }
    put(bytes, starts + w.columns.size() * 4, block);
    for (size_t i = 0; i < w.values.size(); i++) {
        const uint32_t bits = bits_of(w.values[i]);
        if (w.value == F32) put(bytes, values + i * 4, bits);
        if (w.value == BF16) put(bytes, values + i * 2, uint16_t(bits >> 16));
        if (w.value == I8) put(bytes, values + i, int8_t(w.values[i]));
    }
    for (uint32_t r = 0; w.value == I8 && r < w.rows; r++) put(bytes, scales + size_t(r) * 4, w.scales[r]);
    return bytes;
}

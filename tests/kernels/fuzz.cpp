// Damaged and random bytes: the engine must refuse them, or make a weight whose products stay within their bounds,
// which is for the sanitizers to see.
#include "fuzz.h"

#include <cstdio>

#include "secateur.h"

namespace {

void damage(Random& random, std::vector<uint8_t>& bytes) {
    static const uint32_t ODD[] = {0, 1, 2, 3, 16, 0x7f, 0xff, 0x100, 0x7fffffff, 0x80000000u, 0xffffffffu};
    for (uint32_t times = random.below(4); times-- && !bytes.empty();) {
        const size_t at = random.chance(0.5) ? random.below(64) : size_t(random.next() % bytes.size());
        if (at >= bytes.size()) continue;
        switch (random.below(6)) {
            case 0: bytes[at] ^= uint8_t(1u << random.below(8)); break;
            case 1: bytes[at] = uint8_t(random.next()); break;
            case 2:
                if (at / 4 * 4 + 4 <= bytes.size()) put(bytes, at / 4 * 4, random.of(ODD));
                break;
            case 3:  // one number a little more or less
                if (at / 4 * 4 + 4 <= bytes.size()) {
                    uint32_t number;
                    std::memcpy(&number, bytes.data() + at / 4 * 4, 4);
                    put(bytes, at / 4 * 4, number + uint32_t(random.integer(2)));
                }
                break;
            case 4: bytes.resize(random.chance(0.5) ? at : at / 64 * 64); break;
            default: bytes.resize(bytes.size() + 64 * random.below(3)); break;
        }
    }
}

// All that an accepted weight can be asked for.
void multiply(Random& random, sct_matrix* matrix) {
    const uint32_t rows = sct_rows(matrix), cols = sct_cols(matrix);
    if (uint64_t(rows) > 100000 || uint64_t(cols) > 100000) return;  // blocks may have columns without end
    static const uint32_t TOKENS[] = {1, 2, 3, 17, 65};
    const uint32_t n = random.of(TOKENS);
    Exact<float> x(size_t(n) * cols), y(size_t(n) * rows);
    for (size_t i = 0; i < x.size; i++) x[i] = random.normal();
    for (int quantize = 0; quantize < 2; quantize++) {
        const sct_finish finish{nullptr, nullptr, SCT_NONE, 1 + int(random.below(2)), quantize};
        (void)sct_linear(matrix, x.at, n, cols, &finish, y.at);
    }
    const sct_images image{1, cols, 1, n, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    const sct_finish finish{nullptr, nullptr, SCT_NONE, 1, 0};
    (void)sct_conv(matrix, x.at, &image, &finish, y.at);
}

}  // namespace

long fuzz(Random& random, long cases) {
    static const char* const ISAS[] = {"portable", "avx2", "avx512"};
    long refused = 0, taken = 0, broken = 0;
    for (long i = 0; i < cases; i++) {
        const uint32_t rows = random.below(40), cols = random.below(150);
        std::vector<uint8_t> bytes = pack(random_weight(random, rows, cols, random.chance(0.5)));
        if (random.chance(0.02))
            for (uint8_t& byte : bytes) byte = uint8_t(random.next());
        else
            damage(random, bytes);
        Exact<uint8_t> exact(bytes.size());
        std::memcpy(exact.at, bytes.data(), bytes.size());
        sct_matrix* matrix = nullptr;
        if (sct_open(exact.at, bytes.size(), &matrix)) {
            refused++;
            broken += matrix != nullptr;
            continue;
        }
        taken++;
        (void)sct_use(random.of(ISAS));
        multiply(random, matrix);
        sct_close(matrix);
    }
    (void)sct_use("");
    std::printf("fuzz       %8ld cases, %ld refused, %ld taken, %ld broken\n", cases, refused, taken, broken);
    return broken + (cases > 100 && (refused == 0 || taken == 0));
}

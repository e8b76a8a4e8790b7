// Which gallery items are valid for a query, and which of these are its positives.
#pragma once

#include <cstdint>

namespace dml_fast {

// Borrowed arrays; Q queries, G gallery items, I identities.
struct Labels {
    std::int64_t queries;                 // Q
    std::int64_t items;                   // G
    std::int64_t identities;              // I
    const std::int64_t* query_identity;   // (Q), 0..I-1, or -1 where the gallery lacks it
    const std::int64_t* item_identity;    // (G), 0..I-1, or -1 for junk
    const std::int64_t* query_camera;     // (Q); null: no camera rule
    const std::int64_t* item_camera;      // (G); null: no camera rule
    const std::int64_t* member_offsets;   // (I + 1)
    const std::int64_t* members;          // (G - J) items by identity, rising within each
    const std::int64_t* junk;             // (J) rising: items that are valid for no query
    std::int64_t junk_count;              // J

    // Same identity and same camera: left out for this query.
    bool excluded(std::int64_t query, std::int64_t member) const {
        return query_camera != nullptr && query_camera[query] == item_camera[member];
    }

    bool valid(std::int64_t query, std::int64_t item) const {
        if (item_identity[item] < 0) return false;
        return item_identity[item] != query_identity[query] || !excluded(query, item);
    }

    // Items of the query's identity: [begin, end).
    const std::int64_t* same_begin(std::int64_t query) const {
        const std::int64_t identity = query_identity[query];
        return identity < 0 ? members : members + member_offsets[identity];
    }
    const std::int64_t* same_end(std::int64_t query) const {
        const std::int64_t identity = query_identity[query];
        return identity < 0 ? members : members + member_offsets[identity + 1];
    }
};

}  // namespace dml_fast

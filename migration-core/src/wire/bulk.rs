//! The frames of bulk lanes: pages, and the end of a round.

use super::{
    Header, frame,
    kinds::{LANE_VACATED, PAGES, REQUEST, ROUND_END},
};
use crate::{
    codec::{DecodeError, Reader, Writer},
    limits::{MAX_EXTENTS, MAX_REQUESTS},
    page::{PAGE_SHIFT, PageRange},
};

/// The content of the pages of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros. No data follows.
    Zero,
    /// Data, which follows in the payload.
    Plain,
}

/// A run of pages with the same kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The pages.
    pub range: PageRange,
    /// The content of the pages.
    pub content: Content,
}

/// A frame of a bulk or demand lane. Its generation is the header's `number`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bulk {
    /// Pages. The data of the plain ones follows the frame, in the order of the extents.
    Pages {
        /// The extents.
        extents: Vec<Extent>,
        /// The CRC-32 of the payload if [`super::FEATURE_PAYLOAD_CRC`] was agreed on, otherwise 0.
        payload_crc: u32,
    },
    /// The lane has sent all its pages of a round.
    RoundEnd {
        /// The number of pages of this round that were sent on the lane.
        pages: u64,
    },
    /// The destination's guest waits for these pages. Sent only on a demand lane, and only by the
    /// destination.
    Request {
        /// The pages.
        pages: Vec<u64>,
    },
    /// A mark: everything that the source has sent on this lane before *vacated* was read once the
    /// mark is read.
    Vacated {
        /// The number of that *vacated* frame.
        number: u32,
    },
}

impl Bulk {
    /// Returns the number of bytes of page data that follow the frame.
    pub fn payload(&self) -> usize {
        match self {
            Bulk::Pages { extents, .. } => plain_pages(extents) as usize * (1 << PAGE_SHIFT),
            Bulk::RoundEnd { .. } | Bulk::Request { .. } | Bulk::Vacated { .. } => 0,
        }
    }

    /// Returns header and body of the frame.
    pub fn encode(&self, vm: u32, sequence: u32, generation: u32) -> Vec<u8> {
        let mut w = Writer::new();
        let kind = match self {
            Bulk::Pages { extents, payload_crc } => {
                w.u32(*payload_crc).count(extents.len());
                for e in extents {
                    // the count fits: extents have at most MAX_PAYLOAD bytes or, for zeros, 2^31
                    // pages
                    w.u64(e.range.first).u32(e.range.count as u32 | u32::from(e.content == Content::Zero) << 31);
                }
                PAGES
            }
            Bulk::RoundEnd { pages } => {
                w.u64(*pages);
                ROUND_END
            }
            Bulk::Request { pages } => {
                w.count(pages.len());
                for page in pages {
                    w.u64(*page);
                }
                REQUEST
            }
            Bulk::Vacated { number } => {
                w.u32(*number);
                LANE_VACATED
            }
        };
        frame(kind, vm, sequence, generation, self.payload() as u32, &w.into_bytes())
    }

    /// Decodes the body of a frame whose header was read before, for a VM of `pages` pages.
    ///
    /// # Errors
    /// Returns an error if the frame is not one of a bulk lane, an extent is empty or leaves RAM,
    /// extents are not ascending and disjoint, or the payload's length is not that of the plain
    /// pages.
    pub fn decode(header: &Header, body: &[u8], pages: u64) -> Result<Self, DecodeError> {
        header.check_body(body)?;
        let mut r = Reader::new(body);
        let frame = match header.kind {
            PAGES => {
                let payload_crc = r.u32("payload crc")?;
                let extents = extents(&mut r, pages)?;
                if plain_pages(&extents).checked_shl(PAGE_SHIFT) != Some(header.payload.into()) {
                    return Err(DecodeError::invalid("payload length", "not that of the plain pages"));
                }
                Bulk::Pages { extents, payload_crc }
            }
            ROUND_END if header.payload == 0 => Bulk::RoundEnd { pages: r.u64("pages")? },
            REQUEST if header.payload == 0 => {
                let count = r.count(MAX_REQUESTS, "number of pages")?;
                let mut asked = Vec::with_capacity(count);
                for _ in 0..count {
                    let page = r.u64("page")?;
                    if page >= pages {
                        return Err(DecodeError::invalid("page", format!("page {page} is outside RAM")));
                    }
                    asked.push(page);
                }
                Bulk::Request { pages: asked }
            }
            LANE_VACATED if header.payload == 0 => Bulk::Vacated { number: r.u32("number of the mark")? },
            kind => return Err(DecodeError::invalid("kind", format!("{kind:#x} is no frame of a bulk lane"))),
        };
        r.finish()?;
        Ok(frame)
    }
}

/// Decodes extents, and checks that there is at least one, and that they are ascending, disjoint
/// and inside RAM.
fn extents(r: &mut Reader<'_>, pages: u64) -> Result<Vec<Extent>, DecodeError> {
    let count = r.count(MAX_EXTENTS, "number of extents")?;
    let mut extents = Vec::with_capacity(count);
    let mut free = 0;
    for _ in 0..count {
        let first = r.u64("first page")?;
        let word = r.u32("page count")?;
        let range = PageRange::new(first, u64::from(word & !(1 << 31)));
        let content = if word >> 31 != 0 { Content::Zero } else { Content::Plain };
        if range.count == 0 || first < free || first.checked_add(range.count).is_none_or(|e| e > pages) {
            let why = format!("pages {first}+{} are empty, out of order or outside RAM", range.count);
            return Err(DecodeError::invalid("extent", why));
        }
        free = range.end();
        extents.push(Extent { range, content });
    }
    if extents.is_empty() {
        return Err(DecodeError::invalid("number of extents", "none"));
    }
    Ok(extents)
}

fn plain_pages(extents: &[Extent]) -> u64 {
    extents.iter().filter(|e| e.content == Content::Plain).map(|e| e.range.count).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8], pages: u64) -> Result<Bulk, DecodeError> {
        let header = Header::decode(bytes.first_chunk().unwrap())?;
        Bulk::decode(&header, &bytes[Header::LEN..], pages)
    }

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..50, 1u64..20, any::<bool>()), 1..20).prop_map(|v| {
            let mut at = 0;
            let extent = |(gap, count, zero): (u64, u64, bool)| {
                at += gap;
                let range = PageRange::new(at, count);
                at += count;
                Extent { range, content: if zero { Content::Zero } else { Content::Plain } }
            };
            v.into_iter().map(extent).collect()
        })
    }

    proptest! {
        #[test]
        fn round_trip(extents in extents(), sequence: u32, generation: u32) {
            let end = extents.last().unwrap().range.end();
            let frame = Bulk::Pages { extents, payload_crc: 7 };
            let bytes = frame.encode(0, sequence, generation);
            prop_assert_eq!(decode(&bytes, end), Ok(frame));
            prop_assert!(decode(&bytes, end - 1).is_err(), "one page outside RAM");
        }

        #[test]
        fn arbitrary_bodies_never_panic(kind: u8, payload in 0u32..10000, body in prop::collection::vec(any::<u8>(), 0..100)) {
            let bytes = frame(kind, 0, 0, 0, payload, &body);
            let _ = decode(&bytes, 1000);
        }
    }

    #[test]
    fn overlapping_and_huge_extents_are_refused() {
        let extent = |first, count| Extent { range: PageRange::new(first, count), content: Content::Zero };
        for bad in [vec![extent(5, 5), extent(9, 1)], vec![extent(u64::MAX, 1)], vec![extent(0, 0)], vec![]] {
            let bytes = Bulk::Pages { extents: bad.clone(), payload_crc: 0 }.encode(0, 0, 0);
            assert!(decode(&bytes, 1 << 20).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_pages_have_a_payload() {
        for sample in [Bulk::RoundEnd { pages: 7 }, Bulk::Request { pages: vec![1, 2] }, Bulk::Vacated { number: 3 }] {
            let bytes = sample.encode(0, 3, 4);
            assert_eq!(sample.payload(), 0);
            assert_eq!(decode(&bytes, 8), Ok(sample.clone()));
            let with_some = frame(bytes[0], 0, 3, 4, 4096, &bytes[Header::LEN..]);
            assert!(matches!(decode(&with_some, 8), Err(DecodeError::Invalid { .. })), "{sample:?}");
        }
    }
}

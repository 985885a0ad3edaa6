"""The photos of a run, and what the frozen networks say of them, ready to draw from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..degradation import DegradationRange
from ..face_model import FaceModel, face_model_of
from .clip_vision import features_of_nobody
from .draws import Draws
from .photos import Photos, find_photos, some, split_people
from .references import References, compute_features, find_faces, other_photos, strangers
from .settings import AlignSettings, ContentSettings, IdentitySettings, Settings, TrainingError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Material:
    """train, validation: draws from photos that have nothing in common. people: names kept apart, if by person.

    landmarks [N,5,2] of all photos and face_model: in the stages with references, else None.
    """

    photos: Photos
    train: Draws
    validation: Draws
    people: list[str]
    landmarks: Tensor | None = None
    face_model: FaceModel | None = None


def cache_of(settings: Settings) -> Path:
    return Path(settings.cache) if settings.cache else Path(settings.out).parent / "cache"


def usable_photos(settings: Settings, say: Say) -> Photos:
    """All photos that can be read and, where the stage must know who is who, lie in a person's folder.

    say: prints what the user should know. Raises TrainingError: see `photos`; there are no people, or too few.
    """
    photos, skipped = find_photos(Path(settings.data), settings.resolution, cache_of(settings))
    if skipped:
        reasons = some(f"{name} ({reason})" for name, reason in skipped.items())
        say(f"{len(skipped)} of {len(skipped) + len(photos)} photos are left out: {reasons}.")
    if isinstance(settings, AlignSettings):
        photos = _of_people(photos, say)
        split_people(photos.people, settings.validation_people, settings.seed)  # refuses before hours of features
    return photos


def _of_people(photos: Photos, say: Say) -> Photos:
    rows = [row for row, name in enumerate(photos.names) if "/" in name]
    if not rows:
        raise TrainingError(f"The photos lie in '{photos.folder}' itself, but this stage needs to know whose they are: "
                            "put each person's photos into a folder of their own.")
    if loose := [name for name in photos.names if "/" not in name]:
        say(f"{len(loose)} photos are left out, since they are not in a person's folder: {some(loose)}.")
    return photos.only(rows)


def gather(settings: Settings, photos: Photos, tower: nn.Module | None, device, say: Say,
           progress: Callable) -> Material:
    """Compute what is not in the cache, and keep some photos for validation.

    tower: CLIP vision, for the stages with references. progress: as tqdm. Raises TrainingError: see `references`.
    """
    if isinstance(settings, IdentitySettings):
        return _with_references(settings, photos, tower, device, say, progress)
    return _split_photos(settings, photos, None)


def _split_photos(settings: Settings, photos: Photos, references: References | None, **more) -> Material:
    rows = list(range(len(photos)))
    apart = Draws(photos, rows, settings.seed, None, None)
    held = [apart.row(n) for n in range(min(settings.validation_images, len(rows) - 1))]
    kept = set(held)
    return _material(settings, photos, [r for r in rows if r not in kept], held or rows, [], references, **more)


def _material(settings, photos, train, validation, people, references, **more) -> Material:
    degradation = None
    if isinstance(settings, ContentSettings | AlignSettings):
        ranges = settings.degradation
        degradation = DegradationRange(ranges.sigma, ranges.ratio, ranges.noise, ranges.quality)
    draws = (Draws(photos, rows, settings.seed, degradation, references) for rows in (train, validation))
    return Material(photos, *draws, people, **more)


def _with_references(
    settings: IdentitySettings, photos: Photos, tower: nn.Module, device, say: Say, progress: Callable
) -> Material:
    cache = cache_of(settings)
    face_model = face_model_of(settings.face_model)
    seen, landmarks = find_faces(photos, face_model, cache, progress)
    if len(seen) < len(photos):
        faceless = some(sorted(set(photos.names) - set(seen.names)))
        say(f"{len(photos) - len(seen)} photos are left out, for no face was found in them: {faceless}.")
    features = compute_features(seen, landmarks, face_model, tower, settings.reference_sizes, cache, device, progress)
    nobody = features_of_nobody(tower).cpu().float()
    more = {"landmarks": landmarks, "face_model": face_model}
    if not isinstance(settings, AlignSettings):
        itself = {row: [row] for row in range(len(seen))}
        return _split_photos(settings, seen, References(features, itself, 1, settings.drop, nobody), **more)
    _check_people(seen, features.embeddings(max(settings.reference_sizes)), say)
    people = seen.people
    train, apart = split_people(people, settings.validation_people, settings.seed)
    rows = [[row for person in names for row in people[person]] for names in (train, apart or train)]
    references = References(features, other_photos(people), 2, settings.drop, nobody)
    return _material(settings, seen, *rows, apart, references, **more)


def _check_people(photos: Photos, embeddings: Tensor, say: Say) -> None:
    if doubtful := strangers(photos, embeddings):
        named = some(f"{name} ({value:.2f})" for name, value in doubtful)
        say(f"Warning: {len(doubtful)} photos look like another person than the rest of their folder (median "
            f"cosine similarity): {named}.")
    if single := [person for person, rows in photos.people.items() if len(rows) == 1]:
        say(f"{len(single)} people have one photo only ({some(single)}): it is both references, at different sizes.")

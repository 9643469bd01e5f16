# SPDX-License-Identifier: Apache-2.0
"""Draws parts of meshes with OpenGL, without a screen (EGL), on a GPU or by Mesa on the CPU.

Light is fixed in the world and surfaces scatter it evenly (Lambert), so all views of a point agree:
base color * (AMBIENT + sum of strength * max(0, normal . direction)) + emission, in linear values, encoded as sRGB.
A surface is lit on the side that is seen. There are no shadows and no reflections.
"""

from collections.abc import Sequence
from typing import Any

import moderngl
import numpy as np
from make_demo import FOCAL, RADIUS
from numpy.typing import NDArray
from object_parts import MIRROR, REPEAT, Part, Sampler
from PIL import Image

PACKAGES = "libegl1 libgl1"
"""What Debian and Ubuntu have EGL and OpenGL in; Mesa's drivers come with them."""
AMBIENT = 0.32
LIGHTS = (
    ((0.48, -0.55, 0.68), 0.50),
    ((-0.75, 0.60, 0.10), 0.22),
    ((0.55, 0.80, -0.20), 0.16),
    ((-0.30, -0.45, -0.84), 0.12),
)
"""Directions towards the lights (z is up; they are normalized) and their strengths."""
NEAR, FAR = RADIUS - 0.6, RADIUS + 0.6
TEXTURE_SIDE = 4096
"""Larger textures are halved: at the size of training views nothing of them is lost."""
SRGB_ALPHA = 0x8C43  # GL_SRGB8_ALPHA8: texels are filtered as linear values

VERTEX = """
#version 330
uniform mat4 world_to_clip;
in vec3 position; in vec3 normal; in vec2 uv; in vec4 color; in vec2 emission_uv;
out vec3 world; out vec3 smooth_normal; out vec2 place; out vec4 tint; out vec2 emission_place;
void main() {
    gl_Position = world_to_clip * vec4(position, 1);
    world = position; smooth_normal = normal; place = uv; tint = color; emission_place = emission_uv;
}
"""
FRAGMENT = """
#version 330
uniform vec3 eye; uniform sampler2D base_image; uniform sampler2D emission_image;
uniform vec4 base; uniform vec3 emission; uniform float cutoff; uniform int part; uniform int supersample;
uniform bool blend; uniform bool unlit; uniform bool flat_faces;
uniform vec2 base_mirrors; uniform vec2 emission_mirrors;
uniform vec3 directions[LIGHTS]; uniform float strengths[LIGHTS];
in vec3 world; in vec3 smooth_normal; in vec2 place; in vec4 tint; in vec2 emission_place;
out vec4 shown;
vec4 texel(sampler2D image, vec2 at, vec2 mirrors) {
    // Where every second copy is a mirror image, the slopes are those of the unfolded place: its folds are no edges.
    return textureGrad(image, mix(at, 1.0 - abs(mod(at, 2.0) - 1.0), mirrors), dFdx(at), dFdy(at));
}
void main() {
    // The face's own normal, towards the viewer; the vertices' normals follow it, whichever way they point.
    vec3 face = normalize(cross(dFdx(world), dFdy(world)));
    face = dot(face, eye - world) < 0.0 ? -face : face;
    vec3 normal = flat_faces || dot(smooth_normal, smooth_normal) < 1e-12 ? face : normalize(smooth_normal);
    normal = dot(normal, face) < 0.0 ? -normal : normal;

    vec4 color = base * tint * texel(base_image, place, base_mirrors);
    vec3 glow = emission * texel(emission_image, emission_place, emission_mirrors).rgb;
    float least = cutoff;
    if (blend) {
        // Alpha is the share of a pixel's samples that are covered. Surfaces behind each other take different ones.
        int samples = supersample * supersample;
        ivec2 at = ivec2(gl_FragCoord.xy) % supersample;
        int order = at.x + at.y * supersample + 7 * part + (gl_FrontFacing ? 0 : samples / 4);
        least = (float(order % samples) + 0.5) / float(samples);
    }
    if (color.a < least) discard;

    float light = AMBIENT;
    for (int i = 0; i < LIGHTS; i++) light += strengths[i] * max(dot(normal, directions[i]), 0.0);
    vec3 linear = clamp(color.rgb * (unlit ? 1.0 : light) + glow, 0.0, 1.0);
    vec3 curved = 1.055 * pow(linear, vec3(1.0 / 2.4)) - 0.055;  // IEC 61966-2-1
    shown = vec4(mix(curved, linear * 12.92, lessThanEqual(linear, vec3(0.0031308))), 1);
}
"""
COVER = """
#version 330
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1, 0, 1); }
"""
MEAN = """
#version 330
uniform sampler2D fine; uniform int supersample;
out vec4 shown;
void main() {
    ivec2 corner = ivec2(gl_FragCoord.xy) * supersample;
    vec4 sum = vec4(0);
    for (int i = 0; i < supersample * supersample; i++)
        sum += texelFetch(fine, corner + ivec2(i % supersample, i / supersample), 0);
    shown = sum / float(supersample * supersample);
}
"""


class Renderer:
    """Pictures of one size.

    Args:
        size: width and height in pixels.
        supersample: samples along each side of a pixel; they are averaged as displayed values.

    Raises:
        ValueError: there is no OpenGL 3.3 on this machine, or it can't draw pictures that large.
    """

    def __init__(self, size: int, supersample: int) -> None:
        try:
            self._gl = moderngl.create_context(standalone=True, backend="egl", require=330)
        except Exception as error:  # moderngl has one class for all of it
            raise ValueError(
                f"no OpenGL 3.3 through EGL here ({error}): on Debian and Ubuntu, apt-get install {PACKAGES}"
            ) from None
        self.device: str = self._gl.info["GL_RENDERER"]
        fine = size * supersample
        if fine > (largest := self._gl.info["GL_MAX_TEXTURE_SIZE"]):
            raise ValueError(f"{size} pixels of {supersample} samples are more than {self.device} can draw: {largest}")
        self._size, self._supersample = size, supersample
        constants = {"LIGHTS": str(len(LIGHTS)), "AMBIENT": str(AMBIENT)}
        fragment = FRAGMENT
        for name, value in constants.items():
            fragment = fragment.replace(name, value)
        self._program = self._gl.program(vertex_shader=VERTEX, fragment_shader=fragment)
        self._mean = self._gl.program(vertex_shader=COVER, fragment_shader=MEAN)
        self._cover = self._gl.vertex_array(self._mean, [])
        self._samples = self._gl.texture((fine, fine), 4)
        self._fine = self._gl.framebuffer([self._samples], self._gl.depth_renderbuffer((fine, fine)))
        self._small = self._gl.framebuffer([self._gl.renderbuffer((size, size), 4)])
        directions = np.array([direction for direction, _ in LIGHTS])
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self._set("directions", directions.astype("f4").tobytes())
        self._set("strengths", np.array([strength for _, strength in LIGHTS], dtype="f4").tobytes())
        self._program["supersample"] = self._mean["supersample"] = supersample
        self._program["emission_image"] = 1
        self._white = self._gl.texture((1, 1), 4, b"\xff" * 4)

    def _set(self, name: str, data: bytes) -> None:
        self._program[name].write(data)

    def render(self, parts: Sequence[Part], poses: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Pictures [views, size, size, 4] from cameras cam2world [views, 4, 4] (OpenCV): RGB over white, coverage."""
        kept: list[Any] = []
        try:
            drawn = [self._upload(part, kept) for part in parts]
            return np.stack([self._draw(parts, drawn, pose) for pose in poses])
        finally:
            for resource in kept:
                resource.release()

    def _upload(self, part: Part, kept: list[Any]) -> tuple[Any, Any, Any]:
        normals = np.zeros_like(part.positions) if part.normals is None else part.normals
        emission_uv = part.uv if part.emission_uv is None else part.emission_uv
        columns = [part.positions, normals, part.uv, part.colors, emission_uv]
        vertices = np.concatenate(columns, axis=1).astype("f4")
        kept += [self._gl.buffer(vertices.tobytes()), self._gl.buffer(part.triangles.tobytes())]
        layout = [(kept[-2], "3f 3f 2f 4f 2f", "position", "normal", "uv", "color", "emission_uv")]
        kept.append(self._gl.vertex_array(self._program, layout, kept[-1]))
        vertex_array = kept[-1]
        material = part.material
        base = self._texture(material.base_image, material.base_sampler, kept)
        return vertex_array, base, self._texture(material.emission_image, material.emission_sampler, kept)

    def _texture(self, image: Image.Image | None, sampler: Sampler, kept: list[Any]) -> Any:
        if image is None:
            return self._white
        if max(image.size) > TEXTURE_SIDE:
            image = image.copy()
            image.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BOX)
        rows = image.convert("RGBA").transpose(Image.Transpose.FLIP_TOP_BOTTOM)  # OpenGL begins with the lowest
        texture = self._gl.texture(rows.size, 4, rows.tobytes(), internal_format=SRGB_ALPHA)
        kept.append(texture)
        texture.build_mipmaps()
        texture.filter = (moderngl.LINEAR_MIPMAP_LINEAR, moderngl.NEAREST if sampler.nearest else moderngl.LINEAR)
        texture.repeat_x, texture.repeat_y = (wrap == REPEAT for wrap in sampler.wrap)
        return texture

    def _draw(self, parts: Sequence[Part], drawn: Sequence[Any], pose: NDArray[np.float64]) -> NDArray[np.uint8]:
        # Rows of OpenGL's pictures go up, those of the camera down: y keeps its sign, so the lowest row is our first.
        depth = np.array([(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)])
        clip = np.array([[2 * FOCAL, 0, 0, 0], [0, 2 * FOCAL, 0, 0], [0, 0, *depth], [0, 0, 1, 0]])
        self._set("world_to_clip", (clip @ np.linalg.inv(pose)).T.astype("f4").tobytes())
        self._set("eye", pose[:3, 3].astype("f4").tobytes())
        self._fine.use()
        self._gl.enable_only(moderngl.DEPTH_TEST)
        self._fine.clear(1, 1, 1, 0, depth=1)
        for index, (part, (vertex_array, base, emission)) in enumerate(zip(parts, drawn, strict=True)):
            material = part.material
            base.use(0)
            emission.use(1)
            self._program["base"] = material.base
            self._program["emission"] = material.emission
            self._program["cutoff"] = material.cutoff or 0.0
            self._program["blend"] = material.cutoff is None
            self._program["unlit"] = material.unlit
            self._program["base_mirrors"] = [float(wrap == MIRROR) for wrap in material.base_sampler.wrap]
            self._program["emission_mirrors"] = [float(wrap == MIRROR) for wrap in material.emission_sampler.wrap]
            self._program["flat_faces"] = part.normals is None
            self._program["part"] = index
            vertex_array.render(moderngl.TRIANGLES)
        self._small.use()
        self._gl.enable_only(moderngl.NOTHING)
        self._samples.use(0)
        self._cover.render(moderngl.TRIANGLES, vertices=3)
        picture = np.frombuffer(self._small.read(components=4), dtype=np.uint8)
        return picture.reshape(self._size, self._size, 4)
